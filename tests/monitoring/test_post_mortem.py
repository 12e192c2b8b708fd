"""Failed allocations explained from made-up facts, and kept: torch is not needed for it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from oomproof.hardware.usage import GpuProcess
from oomproof.monitoring.blocks import BlockFacts, SizeClass
from oomproof.monitoring.post_mortem import KEPT_SAMPLES, Summary, phase_of, post_mortem
from oomproof.monitoring.record import KEPT, KEPT_SNAPSHOTS, as_text, keep, record_out_of_memory
from oomproof.units import GIB, MIB
from tests.monitoring.made_up import facts, gpu_plan, sample_of

TORCH = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.51 GiB of "
    "which 1.25 GiB is free. Process 4242 has 20.00 GiB memory in use. Of the allocated memory "
    "18.00 GiB is allocated by PyTorch, and 3.00 GiB is reserved by PyTorch but unallocated."
)


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def raised(module: str, function: str, text: str = TORCH) -> OutOfMemoryError:
    """As if a function of ours had raised it."""

    def fail() -> None:
        raise OutOfMemoryError(text)

    made = FunctionType(
        fail.__code__.replace(co_name=function),
        {"__name__": module, "OutOfMemoryError": OutOfMemoryError},
        function,
        None,
        fail.__closure__,
    )
    try:
        made()
    except OutOfMemoryError as error:
        return error
    raise AssertionError


def summary(**changes: Any) -> Summary:
    made = gpu_plan()
    options: dict[str, Any] = {
        "at": 1_700_000_000.5,
        "pid": 4242,
        "blocks": BlockFacts(
            classes=(SizeClass(at_least_bytes=MIB, blocks=3, total_bytes=4 * MIB),),
            largest_free_bytes=512 * MIB,
            free_bytes=3 * GIB,
        ),
        "processes": [
            GpuProcess(pid=4242, name="python", used_bytes=20 * GIB),
            GpuProcess(pid=7, name="Xorg", used_bytes=2 * GIB),
        ],
    }
    samples = [
        sample_of(made, allocator=facts(5 * GIB + number * MIB, 9 * GIB), requests=number)
        for number in range(30)
    ]
    error = raised("oomproof.engine.native.engine", "_launch")
    return post_mortem(error, made, samples, **(options | changes))


def test_what_was_asked_for_where_and_in_which_phase_is_said() -> None:
    found = summary()
    assert (found.asked_bytes, found.free_bytes, found.device) == (2.5 * GIB, 1.25 * GIB, 0)
    assert (found.phase, found.term) == ("decoding", "workspace")
    assert found.error == "OutOfMemoryError"
    assert found.findings[0] == "2.50 GiB were asked for, 1.25 GiB free on device 0"


def test_others_fragmentation_and_growth_are_named() -> None:
    text = "\n".join(summary().findings)
    assert "other processes hold 2.00 GiB on device 0: 7 Xorg" in text
    assert "4242" not in text
    assert "the largest piece 0.50 GiB: fragmentation" in text
    assert "tensors' memory on device 0 grew by 15.0 MiB over the last 16 samples" in text
    assert "no term that was sampled is above its plan" in text


def test_a_term_above_its_plan_is_named() -> None:
    made = gpu_plan()
    terms = replace(made.devices[0].terms, kv_cache=9 * GIB, margin=0)
    found = post_mortem(OutOfMemoryError(TORCH), made, [sample_of(made, terms, facts())], pid=1)
    assert any(finding.startswith("kv_cache of device 0 takes 9.00 GiB") for finding in
               found.findings)  # fmt: skip
    assert "above its plan" not in "\n".join(found.findings)


@pytest.mark.parametrize(
    ("module", "function", "phase"),
    [
        ("oomproof.engine.native.pipeline", "capture", ("recording graphs", "graphs")),
        ("oomproof.engine.native.device", "allocate_pools", ("taking pools", "kv_cache")),
        ("oomproof.engine.native.engine", "_prefill", ("a prompt", "workspace")),
        ("oomproof.loading.pipeline", "anything", ("loading", "staging")),
        ("oomproof.compat.engine", "allocate_caches", ("taking pools", "kv_cache")),
        ("oomproof.loadingdock", "anything", None),
        ("somebody.elses", "_launch", None),
    ],
)
def test_the_phase_is_read_from_the_traceback(
    module: str, function: str, phase: tuple[str, str] | None
) -> None:
    assert phase_of(raised(module, function).__traceback__) == phase


def test_the_functions_that_phases_are_told_by_exist() -> None:
    from importlib import import_module

    from oomproof.monitoring.post_mortem import _PHASES

    for module, function, _, _ in _PHASES:
        source = Path(str(import_module(module).__file__)).read_text()
        assert not function or f"def {function}(" in source, (module, function)


def test_a_phase_that_the_caller_knows_goes_first() -> None:
    assert summary(phase=("a merge", "weights")).phase == "a merge"


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("Tried to allocate 20.00 MiB. GPU 0 has", 20 * MIB),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.", 4096),
        ("Tried to allocate 1.00 TiB", 1024 * GIB),
        ("CUDA error: out of memory", None),
        ("", None),
        ("Tried to allocate " + "9" * 100_000 + " GiB", None),
    ],
)
def test_the_words_of_allocators_are_read(text: str, asked: int | None) -> None:
    found = post_mortem(OutOfMemoryError(text), gpu_plan(), [])
    assert found.asked_bytes == asked
    assert len(found.message) <= 2000


def test_nothing_sampled_is_no_failure() -> None:
    found = post_mortem(OutOfMemoryError(TORCH), gpu_plan(), [], pid=1)
    assert found.devices[0].measured is None
    assert "margin" in as_text(found)


def test_neither_error_nor_tensors_are_kept_alive() -> None:
    class Tensor:
        pass

    def fail() -> None:
        tensor = Tensor()
        kept.append(weakref.ref(tensor))
        raise OutOfMemoryError(TORCH)

    kept: list[weakref.ref[Tensor]] = []
    try:
        fail()
    except OutOfMemoryError as error:
        found = post_mortem(error, gpu_plan(), [])
    gc.collect()
    assert kept[0]() is None
    assert found.asked_bytes == 2.5 * GIB


def test_the_text_has_the_numbers_and_the_json_all_of_them(tmp_path: Path) -> None:
    found = summary()
    file = keep(found, tmp_path)
    text = file.read_text()
    for expected in (
        "out of memory: llama-3.1-8b nf4-dq, native engine, 2023-11-14 22:13:20 UTC",
        "2.50 GiB were asked for",
        "from 1.00 MiB",
        "3 blocks",
        "Xorg",
        "(this one)",
        "OutOfMemoryError: CUDA out of memory.",
    ):
        assert expected in text
    plain = json.loads(file.with_suffix(".json").read_text())
    assert plain["schema"] == 1
    assert plain["asked_bytes"] == 2.5 * GIB
    assert len(plain["samples"]) == KEPT_SAMPLES
    assert plain["devices"][0]["allocator"]["reserved_bytes"] == 9 * GIB


def test_a_bounded_number_is_kept_the_newest_ones(tmp_path: Path) -> None:
    found = summary()
    for number in range(KEPT + 7):
        keep(replace(found, at=found.at + number), tmp_path, snapshot=b"{}")
    assert len(list(tmp_path.glob("*.txt"))) == KEPT
    assert len(list(tmp_path.glob("*.snapshot.json"))) == KEPT_SNAPSHOTS
    assert len(list(tmp_path.iterdir())) == 2 * KEPT + KEPT_SNAPSHOTS
    newest = max(path.name for path in tmp_path.glob("*.txt"))
    assert newest.startswith("20231114T221346")


def test_recording_on_this_machine_writes_both_files(tmp_path: Path) -> None:
    made = gpu_plan()
    record = record_out_of_memory(
        raised("oomproof.engine.native.engine", "_prefill"), made, [sample_of(made)],
        folder=tmp_path / "new",
    )  # fmt: skip
    assert record.file is not None
    assert record.file.read_text().startswith("out of memory: ")
    assert record.summary.phase == "a prompt"


def test_a_folder_that_takes_nothing_still_gives_the_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    record = record_out_of_memory(
        OutOfMemoryError(TORCH), gpu_plan(), [], folder=tmp_path / "file" / "x"
    )
    assert record.file is None
    assert record.summary.asked_bytes == 2.5 * GIB
    assert "cannot be kept" in caplog.text


class FakeMemory:
    def _snapshot(self) -> dict[str, Any]:
        event = {"action": "oom", "size": 5, "frames": []}
        return {
            "segments": [{"device": 0, "blocks": [{"size": MIB, "state": "active_allocated"}]}],
            "device_traces": [[event]],
        }


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_snapshot_is_kept_as_json_where_history_was_on(
    is_lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> dict[str, Any]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    torch: Any = ModuleType("torch")
    torch.cuda = ModuleType("torch.cuda")
    torch.cuda.is_initialized = lambda: True
    torch.cuda.memory = FakeMemory()
    if is_lost:
        torch.cuda.memory._snapshot = lost
    monkeypatch.setitem(sys.modules, "torch", torch)
    record = record_out_of_memory(OutOfMemoryError(TORCH), gpu_plan(), [], folder=tmp_path)
    snapshots = list(tmp_path.glob("*.snapshot.json"))
    assert len(snapshots) == (0 if is_lost else 1)
    if not is_lost:
        assert json.loads(snapshots[0].read_text())["events"] == [["oom", 5, 0, 0, -1]]
        assert record.summary.blocks is not None
        assert record.summary.blocks.classes[0].total_bytes == MIB


def test_neither_summaries_nor_the_view_import_torch() -> None:
    script = (
        "import sys, oomproof.monitoring.record, oomproof.monitoring.sampler; "
        "import oomproof.monitoring.view; "
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
