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


def planned(*notes: CalibrationNote, format_name: str = "nf4-dq", gpus: str = "H200") -> Plan:
    request = PlanRequest(format=format_name)
    return make_plan(resolve("llama-3.1-8b"), describe(gpus), request, Notes(notes))


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


def test_the_measured_context_takes_the_place_of_the_catalogued_one() -> None:
    [device] = planned(NOTE).devices
    assert 700 * MIB < device.terms.cuda_context < planned().devices[0].terms.cuda_context
    larger = replace(NOTE, cuda_context_bytes=900 * MIB)
    assert planned(NOTE, larger).devices[0].terms.cuda_context > 900 * MIB


def test_a_workspace_that_was_exceeded_is_planned_with_what_it_lacked() -> None:
    base = planned(replace(NOTE, workspace_excess_bytes=0)).devices[0].terms
    lacked = replace(NOTE, workspace_excess_bytes=100 * MIB)
    assert planned(lacked).devices[0].terms.workspace == base.workspace + 100 * MIB
    assert planned(NOTE).devices[0].terms.workspace == base.workspace


def test_a_failed_rehearsal_makes_the_next_plan_larger() -> None:
    failed = replace(
        NOTE, failed="out of memory while running", workspace_excess_bytes=2**30, decode_factor=None
    )
    assert planned(failed).devices[0].peak_bytes > planned().devices[0].peak_bytes


def test_speeds_are_corrected_by_the_median_of_what_was_timed() -> None:
    base = planned().tokens_per_second
    found = planned(NOTE).tokens_per_second
    assert base.decode is not None
    assert found.decode == pytest.approx(base.decode / 1.25, rel=0.01)
    assert base.prefill is not None
    assert found.prefill == pytest.approx(base.prefill / 0.8, rel=0.01)
    several = [replace(NOTE, decode_factor=factor) for factor in (1.0, 1.25, 9.0)]
    assert planned(*several).tokens_per_second.decode == found.decode


def test_notes_of_another_device_engine_or_kind_do_not_count() -> None:
    base = planned()
    for other in (
        replace(NOTE, device="NVIDIA A100-SXM4-80GB"),
        replace(NOTE, engine="native"),
    ):
        assert planned(other) == base
    bf16 = planned(NOTE, format_name="bf16")
    assert bf16.tokens_per_second == planned(format_name="bf16").tokens_per_second
    # The context does not depend on the weights.
    assert bf16.devices[0].terms.cuda_context == planned(NOTE).devices[0].terms.cuda_context


def test_a_plan_says_that_it_was_calibrated() -> None:
    assert (
        "calibrated by 1 rehearsal on NVIDIA H200, the last one of 2026-11-21"
        in planned(NOTE).reasons
    )
    assert not [reason for reason in planned().reasons if "calibrated" in reason]


def test_every_format_has_a_kind() -> None:
    assert {kind_of(each) for each in FORMATS.values()} == {"16-bit", "8-bit", "4-bit"}
