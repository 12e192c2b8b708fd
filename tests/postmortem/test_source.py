"""A log as lines, whatever its size and bytes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomproof.errors import InputError
from oomproof.faults.line import MAX_LINE
from oomproof.postmortem.source import open_log, read_lines


def lines_of(data: bytes) -> list[str]:
    return list(read_lines(io.BytesIO(data), "log"))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_each_kind_of_line_end_ends_a_line_wherever_a_piece_ends(end: bytes) -> None:
    lines = [f"line {number}" for number in range(40_000)]
    assert lines_of(end.join(line.encode() for line in lines)) == lines


def test_a_log_of_windows_in_utf_16_is_read() -> None:
    text = "RuntimeError: CUDA error: out of memory\r\nnext"
    assert lines_of(text.encode("utf-16")) == text.split("\r\n")
    assert lines_of(b"\xef\xbb\xbfa\nb") == ["a", "b"]


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert lines_of(b"caf\xe9 x\nb") == ["caf� x", "b"]


def test_a_line_of_a_hundred_megabytes_is_cut() -> None:
    class Endless(io.RawIOBase):
        left = 1_600

        def read(self, size: int = -1) -> bytes:
            self.left -= 1
            return b"x" * size if self.left > 0 else b""

    [line] = read_lines(Endless(), "log")  # type: ignore[arg-type]
    assert line == "x" * MAX_LINE


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "log is empty"),
        (b"\0\0\0\0", "log is binary"),
        (b"\x89PNG\r\n\x1a\n\0\0", "log is binary"),
        (bytes(range(1, 9)) * 10, "log is binary"),
        (b"\x1f\x8b\x08\x00", "log is binary"),
    ],
)
def test_what_is_no_text_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(InputError, match=why):
        lines_of(data)


def test_colours_and_progress_bars_are_no_reason_to_refuse() -> None:
    assert lines_of(b"\x1b[31mred\x1b[0m\r 10%\r 20%\n")[0] == "\x1b[31mred\x1b[0m"


def test_a_file_that_breaks_off_while_it_is_read_is_one_clear_error() -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(InputError, match=r"log cannot be read \(Input/output error\)"):
        list(read_lines(Broken(), "log"))  # type: ignore[arg-type]


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"), open_log(str(tmp_path / "x")):
        pass
    with pytest.raises(InputError, match="is a folder"), open_log(str(tmp_path)):
        pass
    with pytest.raises(InputError, match="no name of a file"), open_log("a\0b"):
        pass
    with pytest.raises(InputError, match="cannot be read"), open_log("x" * 5000):
        pass


@given(st.binary(max_size=2000))
def test_any_bytes_are_lines_or_one_clear_error(data: bytes) -> None:
    try:
        lines = lines_of(data)
    except InputError:
        return
    assert all("\n" not in line for line in lines)
