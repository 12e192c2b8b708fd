"""What rehearsals leave behind, and what the next plan makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from oomproof.errors import InputError
from oomproof.formats import FORMATS
from oomproof.hardware.describe import describe
from oomproof.models.resolve import resolve
from oomproof.planning.notes import (
    CalibrationNote,
    Notes,
    kind_of,
    notes_file,
    read_notes,
    write_notes,
)
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.units import MIB

NOTE = CalibrationNote(
    date="2026-11-21",
    device="NVIDIA H200",
    engine="transformers",
    kind="4-bit",
    versions="torch 2.11.0, transformers 5.17.0",
    model="llama-3.1-8b",
    format="nf4-dq",
    context=8192,
    concurrency=1,
    failed=None,
    cuda_context_bytes=700 * MIB,
    workspace_excess_bytes=-50 * MIB,
    decode_factor=1.25,
    prefill_factor=0.8,
)


engines = pytest.mark.parametrize("engine", ["native", "transformers"])


def planned(
    *notes: CalibrationNote, engine: str = "transformers", format_name: str = "nf4-dq"
) -> Plan:
    request = PlanRequest(format=format_name, engine=engine)
    return make_plan(resolve("llama-3.1-8b"), describe("H200"), request, Notes(notes))


def test_notes_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.jsonl"
    assert read_notes(path) == Notes()
    write_notes([NOTE], path)
    write_notes([replace(NOTE, failed="out of memory while loading"), NOTE], path)
    assert [note.failed for note in read_notes(path).entries] == [
        None,
        "out of memory while loading",
        None,
    ]
    assert read_notes(path).entries[0] == NOTE


def test_where_notes_are_kept() -> None:
    assert notes_file({"OOMPROOF_HOME": "/a"}) == Path("/a/calibration.jsonl")
    assert notes_file({"XDG_STATE_HOME": "/b"}) == Path("/b/oomproof/calibration.jsonl")
    assert notes_file({}) == Path("~/.local/state/oomproof/calibration.jsonl").expanduser()


@pytest.mark.parametrize(
    "text", ["{", "[]", "null\n", '{"date": "x"}', "\x00", '{"date": 5, "device": "a"}']
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.jsonl"
    write_notes([NOTE], path)
    with path.open("a") as file:
        file.write(text)
    with pytest.raises(InputError, match=r"calibration\.jsonl, line 2: .*rehearse again"):
        read_notes(path)


def test_a_file_without_bounds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.jsonl"
    with path.open("wb") as file:
        file.truncate(5 * MIB)
    with pytest.raises(InputError, match="is larger than"):
        read_notes(path)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="set OOMPROOF_HOME"):
        write_notes([NOTE], tmp_path / "file" / "calibration.jsonl")


@engines
def test_the_measured_context_takes_the_place_of_the_catalogued_one(engine: str) -> None:
    note = replace(NOTE, engine=engine, cuda_context_bytes=600 * MIB)
    [catalogued] = planned(engine=engine).devices
    [device] = planned(note, engine=engine).devices
    assert 600 * MIB < device.terms.cuda_context < catalogued.terms.cuda_context
    larger = replace(note, cuda_context_bytes=900 * MIB)
    assert planned(note, larger, engine=engine).devices[0].terms.cuda_context > 900 * MIB


@engines
def test_a_workspace_that_was_exceeded_is_planned_with_what_it_lacked(engine: str) -> None:
    def workspace(excess_bytes: int) -> int:
        note = replace(NOTE, engine=engine, workspace_excess_bytes=excess_bytes)
        return planned(note, engine=engine).devices[0].terms.workspace

    assert workspace(100 * MIB) == workspace(0) + 100 * MIB
    assert workspace(-50 * MIB) == workspace(0)


@engines
def test_a_failed_rehearsal_makes_the_next_plan_larger(engine: str) -> None:
    failed = replace(
        NOTE,
        engine=engine,
        failed="out of memory while running",
        workspace_excess_bytes=2**30,
        decode_factor=None,
    )
    before, after = (planned(*notes, engine=engine).devices[0] for notes in ((), (failed,)))
    assert after.peak_bytes > before.peak_bytes


@engines
def test_speeds_are_corrected_by_the_median_of_what_was_timed(engine: str) -> None:
    note = replace(NOTE, engine=engine)
    base = planned(engine=engine).tokens_per_second
    found = planned(note, engine=engine).tokens_per_second
    assert base.decode is not None
    assert found.decode == pytest.approx(base.decode / 1.25, rel=0.01)
    assert base.prefill is not None
    assert found.prefill == pytest.approx(base.prefill / 0.8, rel=0.01)
    several = [replace(note, decode_factor=factor) for factor in (1.0, 1.25, 9.0)]
    assert planned(*several, engine=engine).tokens_per_second.decode == found.decode


@pytest.mark.parametrize(
    ("engine", "other"), [("native", "transformers"), ("transformers", "native")]
)
def test_notes_of_another_device_engine_or_kind_do_not_count(engine: str, other: str) -> None:
    note = replace(NOTE, engine=engine)
    base = planned(engine=engine)
    for strange in (
        replace(note, device="NVIDIA A100-SXM4-80GB"),
        replace(note, engine=other),
    ):
        assert planned(strange, engine=engine) == base
    bf16 = planned(note, engine=engine, format_name="bf16")
    assert bf16.tokens_per_second == planned(engine=engine, format_name="bf16").tokens_per_second
    # The context does not depend on the weights.
    [measured] = planned(note, engine=engine).devices
    assert bf16.devices[0].terms.cuda_context == measured.terms.cuda_context


def test_the_engine_that_is_chosen_brings_its_own_notes() -> None:
    """int8 is our own engine's and llm-int8 is not: each is planned with what it left behind."""
    native = replace(NOTE, engine="native", cuda_context_bytes=500 * MIB)
    theirs = replace(NOTE, cuda_context_bytes=600 * MIB)
    contexts = {
        name: planned(native, theirs, engine="auto", format_name=name).devices[0].terms.cuda_context
        for name in ("int8", "llm-int8")
    }
    assert 500 * MIB < contexts["int8"] < 600 * MIB < contexts["llm-int8"] < 700 * MIB


@engines
def test_a_plan_says_that_it_was_calibrated(engine: str) -> None:
    note = replace(NOTE, engine=engine)
    said = "calibrated by 1 rehearsal on NVIDIA H200, the last one of 2026-11-21"
    assert said in planned(note, engine=engine).reasons
    assert not [r for r in planned(engine=engine).reasons if "calibrated" in r]


def test_every_format_has_a_kind() -> None:
    kinds = {kind_of(each) for each in FORMATS.values()}
    assert kinds == {"16-bit", "8-bit", "fp8", "4-bit"}
    assert (kind_of(FORMATS["int8"]), kind_of(FORMATS["fp8"])) == ("8-bit", "fp8")


@pytest.mark.parametrize(("measured", "other"), [("int8", "fp8"), ("fp8", "int8")])
def test_integers_and_floats_of_8_bits_do_not_share_their_notes(measured: str, other: str) -> None:
    """Each has its own kernels, and so its own calibration."""
    kind = kind_of(FORMATS[measured])
    note = replace(NOTE, engine="native", format=measured, kind=kind)
    speeds = {
        name: (
            planned(engine="native", format_name=name).tokens_per_second,
            planned(note, engine="native", format_name=name).tokens_per_second,
        )
        for name in (measured, other)
    }
    assert speeds[other][0] == speeds[other][1]
    assert speeds[measured][0] != speeds[measured][1]


def test_notes_of_fp8_that_were_kept_with_the_integers_are_read_as_fp8(tmp_path: Path) -> None:
    path = tmp_path / "calibration.jsonl"
    old = replace(NOTE, engine="native", format="fp8", kind="8-bit")
    write_notes([old, replace(old, format="int8")], path)
    assert [note.kind for note in read_notes(path).entries] == ["fp8", "8-bit"]
