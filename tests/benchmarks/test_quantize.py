"""The benchmark of `quantize`: the command in a process, and what a job adds to one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmarks.quantize import HOST_LIMIT_BYTES, added, in_a_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_the_command_is_measured_from_its_start_to_its_end(tmp_path: Path) -> None:
    found = in_a_process("tiny", tmp_path / "out", ["--device", "cpu", "--no-search"])
    assert (found["kind"], found["block_scales"], found["within_limit"]) == (
        "process",
        "absmax",
        True,
    )
    peak, anonymous = found["host_peak_bytes"], found["host_anonymous_bytes"]
    assert isinstance(peak, int)
    assert isinstance(anonymous, int)
    assert 100 << 20 < anonymous < peak < HOST_LIMIT_BYTES


def test_what_a_job_adds_is_within_its_bound(tmp_path: Path) -> None:
    found = added("tiny", tmp_path / "out", "nf4", "cpu", search=True)
    assert found["within_bound"]
    assert found["verified_files"] == 7
