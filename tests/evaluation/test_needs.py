"""What an evaluation takes: what it allocates, and how long a text there is room for."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oomproof.errors import PlanDoesNotFitError
from oomproof.evaluation.needs import (
    Needs,
    Room,
    absmax_numel,
    find_room,
    needs_of,
    slice_rows,
    source_bytes,
    unit_tensors,
)
from oomproof.evaluation.stored_folder import StreamedFolder, open_folder
from oomproof.evaluation.streamed import StreamedWeights
from oomproof.evaluation.variants import StoredFolder, Variant, plain
from oomproof.formats import DType, mixture
from oomproof.hardware.describe import describe
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.memory.profiles import engine_profile
from oomproof.models.resolve import bundled_folder, resolve, with_checkpoint
from oomproof.units import GIB
from tests.conversion.jobs import quantized

VARIANTS = tuple(plain(name) for name in ("bf16", "nf4", "nf4-dq", "nf4-g16", "int8"))
CONTEXT = 128


def of_tiny(device: DeviceSpec, hardware: Hardware) -> Needs:
    return needs_of(
        with_checkpoint(resolve("tiny")),
        VARIANTS,
        context=CONTEXT,
        compute_dtype=DType.BFLOAT16,
        device=device,
        hardware=hardware,
    )


def room(needs: Needs, hardware: Hardware, usable: int, host: int, windows: int) -> Room:
    return find_room(
        needs,
        hardware,
        hardware.devices[0],
        usable_bytes=usable,
        host_bytes=host,
        windows=windows,
        context=CONTEXT,
        scored=CONTEXT,
    )


def test_weights_are_allocated_as_they_are_counted() -> None:
    hardware = probe()
    device = replace(hardware.devices[0], kind="cpu")
    spec = with_checkpoint(resolve("tiny"))
    needs = of_tiny(device, hardware)
    profile = engine_profile("native", device, hardware.host)
    before: list[int] = []
    real = torch.empty

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        found: torch.Tensor = real(*arguments, **options)  # type: ignore[call-overload]
        before.append(found.nbytes)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        StreamedWeights(
            spec, Path(bundled_folder()), VARIANTS, DType.BFLOAT16, torch.device("cpu"), profile
        )
    assert before == [needs.device[name] for name in ("source", "weights", "absmax")]
    assert needs.device["stored"] == 0


def test_a_folders_largest_unit_is_counted_beside_all_others(tmp_path: Path) -> None:
    hardware = probe()
    device = replace(hardware.devices[0], kind="cpu")
    spec = with_checkpoint(resolve("tiny"))
    path = quantized(tmp_path / "out", format="nf4-dq")
    own = StoredFolder(spec=with_checkpoint(resolve(str(path))), path=path)
    variant = open_folder("out/", own, spec)
    needs = needs_of(
        spec,
        (*VARIANTS, variant),
        context=CONTEXT,
        compute_dtype=DType.BFLOAT16,
        device=device,
        hardware=hardware,
    )
    profile = engine_profile("native", device, hardware.host)
    streamed = StreamedFolder(variant, DType.BFLOAT16, torch.device("cpu"), profile)
    assert streamed.memory.nbytes == needs.device["stored"] > 0
    without = of_tiny(device, hardware)
    assert needs.device_bytes == without.device_bytes + needs.device["stored"]
    assert needs.state_bytes == without.state_bytes * 6 // 5


def test_blocks_of_16_have_room_for_their_scales_in_wide_models() -> None:
    spec = resolve("llama-3.1-8b")
    hardware = probe()
    profile = engine_profile("native", replace(hardware.devices[0], kind="cpu"), hardware.host)
    widest = 14336 * 4096
    assert absmax_numel(spec, (plain("bf16"), plain("nf4-dq")), profile) == widest // 64
    assert absmax_numel(spec, (plain("bf16"), plain("nf4-g16")), profile) == widest // 16
    by_tensor = mixture({"model.layers.3.mlp.up_proj.weight": "nf4-g16"})
    mixed = Variant(name="fit", format=by_tensor, search=True)
    assert absmax_numel(spec, (plain("bf16"), mixed), profile) == widest // 16


def test_a_tied_head_is_not_counted_twice() -> None:
    spec = with_checkpoint(resolve("tiny"))
    units = unit_tensors(spec)
    assert sum(len(unit) for unit in units) == len(spec.tensors)
    assert sum(source_bytes(spec, unit) for unit in units) >= 2 * spec.num_parameters


@pytest.mark.parametrize("columns", [64, 96, 100, 4096, 11008, 14336])
def test_slices_begin_at_whole_nested_blocks(columns: int) -> None:
    assert slice_rows(columns) * columns % (64 * 256) == 0


@pytest.mark.parametrize("gpu", [True, False])
def test_the_longest_text_that_is_named_fits_and_a_window_more_does_not(gpu: bool) -> None:
    hardware = describe("1x24GiB") if gpu else probe()
    needs = of_tiny(hardware.devices[0], hardware)
    each = needs.state_bytes + needs.figure_bytes
    host = needs.host_bytes + 10 * CONTEXT * each
    usable = needs.device_bytes + 3 * CONTEXT * needs.state_bytes if gpu else 1 << 50
    if not gpu:
        host += needs.device_bytes
    with pytest.raises(PlanDoesNotFitError, match=r"use --tokens \d+ at most") as refused:
        room(needs, hardware, usable, host, 1000)
    most = int(re.findall(r"--tokens (\d+)", str(refused.value))[0])
    assert most == 10 * CONTEXT
    assert refused.value.exit_code == 3
    assert refused.value.shortfall_bytes > 0
    assert room(needs, hardware, usable, host, 10).states_on_device is not gpu
    with pytest.raises(PlanDoesNotFitError):
        room(needs, hardware, usable, host, 11)


def test_states_stay_on_a_gpu_that_has_room() -> None:
    hardware = describe("1x24GiB")
    needs = of_tiny(hardware.devices[0], hardware)
    found = room(needs, hardware, 24 * GIB, 24 * GIB, 4)
    assert found == Room(
        states_on_device=True,
        peak_bytes=needs.device_bytes + 4 * CONTEXT * needs.state_bytes,
    )


def test_where_not_even_a_window_fits_something_else_is_proposed() -> None:
    hardware = describe("1x24GiB")
    needs = of_tiny(hardware.devices[0], hardware)
    with pytest.raises(PlanDoesNotFitError, match="fewer --formats, a shorter --context"):
        room(needs, hardware, needs.device_bytes - 1, 24 * GIB, 1)


def test_a_405b_is_evaluated_on_a_card_of_48_gib() -> None:
    spec = resolve("llama-3.1-405b")
    hardware = describe("1x48GiB")
    needs = needs_of(
        spec,
        VARIANTS,
        context=2048,
        compute_dtype=DType.BFLOAT16,
        device=hardware.devices[0],
        hardware=hardware,
    )
    assert needs.device_bytes < 24 * GIB
