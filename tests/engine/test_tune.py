"""Tuning a plan's products: which there are, who may, what is measured, and where it is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from oomproof import session
from oomproof.engine import tune as tune_module
from oomproof.engine.native.step_products import StepProduct, products_of, random_set
from oomproof.engine.tune import (
    COPIES_BYTES,
    Time,
    check_tunable,
    copies_of,
    scratch_of,
    tune_on,
)
from oomproof.errors import InputError, NotRunnableError, OomproofError
from oomproof.hardware.describe import describe
from oomproof.models.resolve import resolve
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.quantization.products_tiled import MOST_NORMED
from oomproof.quantization.tune_products import ProductTiming, Shape
from oomproof.quantization.tuned import Gpu, own_file, tuned_launches
from oomproof.units import GIB, MIB

GPU = Gpu(name="NVIDIA H200", capability=(9, 0))
LLAMA = "llama-3.1-8b"
SMALL = "llama-3.2-1b"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    monkeypatch.setattr(tune_module, "installed_nvrtc", lambda: "nvrtc 13.0")
    tuned_launches.cache_clear()
    yield tmp_path
    tuned_launches.cache_clear()


def planned(model: str = LLAMA, **options: Any) -> Plan:
    request = PlanRequest(**{"format": "nf4-dq", "engine": "native", "context": 1024, **options})
    return make_plan(resolve(model), describe("H200"), request)


@dataclass
class FakeBench:
    """A GPU on which eight warps are always faster by a fifth, and each split slower."""

    gpu: Gpu = GPU
    limits: tuple[int, int] = (132, 227 << 10)
    gain: float = 0.2
    asked: list[tuple[str, int, bool]] = field(default_factory=list)

    @contextmanager
    def timing(self, product: StepProduct, tokens: int, *, normed: bool) -> Iterator[Time]:
        self.asked.append((product.name, tokens, normed))

        def time(shape: Shape) -> float:
            return 10.0 - self.gain * (10.0 * (shape.warps == 8) - shape.splits)

        yield time


# --- what there is


@pytest.mark.parametrize(
    ("format_name", "scales"),
    [("nf4", "float32"), ("nf4-dq", "uint8"), ("fp4-dq", "uint8"), ("int4", "bfloat16")],
)
def test_a_layer_has_four_products_of_the_models_shapes(format_name: str, scales: str) -> None:
    plan = planned(format=format_name)
    keys = {
        product.name: product.key(4, 132, normed=False)
        for product in products_of(plan, resolve(LLAMA))
    }
    assert {name: (key.columns, key.tiles, key.unit) for name, key in keys.items()} == {
        "qkv": (4096, 6144 // 16, 1),
        "o": (4096, 4096 // 16, 1),
        "gate_up": (4096, 2 * 14336 // 16, 2),
        "down": (14336, 4096 // 16, 1),
    }
    assert {(key.scales, key.template, key.processors) for key in keys.values()} == {
        (scales, 4, 132)
    }


def test_a_made_up_set_lies_as_a_layers_does() -> None:
    qkv, _, gate_up, _ = products_of(planned(SMALL), resolve(SMALL))
    for product, strides in ((qkv, [1, 1, 1]), (gate_up, [2, 2])):
        weights = random_set(product.block, torch.device("cpu"))
        key = product.key(1, 132, normed=False)
        assert (len(weights.codes), weights.columns) == (key.tiles, key.columns)
        assert [segment.tile_stride for segment in weights.segments] == strides
        assert weights.scales.dtype == torch.uint8
        assert len(weights.codes.unique()) == 256
        for segment in weights.segments:
            assert segment.nested is not None
            for part in segment.nested:
                assert 0.004 < float(part.min()) <= float(part.max()) < 0.011


def test_a_model_that_does_not_use_the_kernel_has_nothing_to_tune() -> None:
    # Its hidden states are 4.5 times 128 wide.
    plan, spec = planned("smollm2-135m"), resolve("smollm2-135m")
    with pytest.raises(NotRunnableError, match="columns of 128: there is nothing to tune"):
        products_of(plan, spec)


def test_copies_are_bounded_and_fit() -> None:
    assert copies_of(13 * MIB, 100 * GIB) == COPIES_BYTES // (13 * MIB)
    assert copies_of(COPIES_BYTES + 1, 100 * GIB) == 1
    assert copies_of(MIB, 100 * GIB) == 64
    assert copies_of(13 * MIB, 40 * MIB) == 3
    assert copies_of(13 * MIB, 13 * MIB - 1) == 0
    assert copies_of(13 * MIB, -1) < 1


# --- who may


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"format": "bf16"}, r"bf16 has no launches .*: use --format nf4 or .*nf4-dq.*int4"),
        ({"format": "int8"}, "int8 has no launches"),
        ({"format": "nf4", "compute_dtype": "float32"}, "products in float32 .*: compute in bf"),
        ({"format": "nf4", "engine": "transformers"}, "planned for transformers: use --engine"),
    ],
)
def test_a_plan_without_a_choice_of_launches_is_refused(
    options: dict[str, Any], named: str
) -> None:
    with pytest.raises(OomproofError, match=named):
        check_tunable(planned(**options))


def test_tuning_on_a_processor_is_refused_before_anything_is_written(home: Path) -> None:
    with pytest.raises(NotRunnableError, match="planned for a processor: run it where such a GPU"):
        session.tune_kernels("tiny", format="nf4", context=256)
    assert list(home.iterdir()) == []
    with pytest.raises(InputError, match="must be numbers from 1"):
        session.tune_kernels("tiny", requests=[0])


# --- what is measured and kept


def tune(bench: FakeBench, told: Callable[[str, ProductTiming], None] | None = None) -> Any:
    plan, spec = planned(concurrency=24), resolve(LLAMA)
    return tune_on(bench, plan, spec, products_of(plan, spec), told)


def test_every_product_is_measured_for_every_graph_that_multiplies_it_at_once() -> None:
    bench, lines = FakeBench(), []
    found = tune(bench, lambda device, timing: lines.append((device, timing)))
    assert bench.asked == [
        (name, tokens, name in {"qkv", "gate_up"} and tokens <= MOST_NORMED)
        for name in ("qkv", "o", "gate_up", "down")
        for tokens in (1, 2, 4, 8, 16, 24)
    ]
    assert [line[1] for line in lines] == list(found.timings)
    assert {line[0] for line in lines} == {"NVIDIA H200"}
    assert all(timing.candidates > 1 for timing in found.timings if timing.tokens < 8)


def test_winners_are_kept_and_looked_up_from_then_on() -> None:
    found = tune(FakeBench())
    assert found.file == str(own_file(GPU))
    kept = tuned_launches(GPU)
    assert kept == {timing.key: timing.tuned for timing in found.timings if timing.tuned}
    assert {key.template for key in kept} == {1, 2, 4, 8, 16, 32}
    assert {(key.template, entry.warps) for key, entry in kept.items() if entry.warps > 8} == {
        (16, 16),
        (8, 16),
        (32, 12),
    }
    written = json.loads(Path(found.file).read_text())
    assert written["versions"] == f"torch {torch.__version__}, nvrtc 13.0"
    # A tuning that finds nothing takes back what one found.
    tune(FakeBench(gain=0.0))
    assert tuned_launches(GPU) == {}


def test_what_a_gpu_multiplies_in_pieces_is_not_measured() -> None:
    bench = FakeBench(gpu=Gpu(name="NVIDIA L40S", capability=(8, 9)), limits=(128, 99 << 10))
    tune(bench)
    assert {1, 2, 4} <= {tokens for _, tokens, _ in bench.asked} <= {1, 2, 4, 8}


def test_scratch_is_what_the_engine_will_have() -> None:
    assert scratch_of(planned(), resolve(LLAMA)) >= 32 * MIB


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cap", [None, "4GiB"])
def test_a_small_model_is_tuned_within_its_cap_and_used_when_it_is_loaded(
    cap: str | None,
) -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    report = session.tune_kernels(
        SMALL, requests=[2], format="nf4-dq", engine="native", context=256, cap=cap
    )
    [found] = report.devices
    assert [(t.name, t.tokens) for t in found.timings] == [
        (name, tokens) for name in ("qkv", "o", "gate_up", "down") for tokens in (1, 2)
    ]
    assert torch.cuda.max_memory_allocated(device) - before < COPIES_BYTES + 128 * MIB
    assert torch.cuda.memory_allocated(device) - before < MIB
    assert Path(found.file).is_file()
    [engine] = session.bench(
        SMALL, requests=[2], contexts=[16], format="nf4-dq", engine="native", context=256
    ).engines
    assert all(timing.tokens_per_second > 0 for timing in engine.timings)
