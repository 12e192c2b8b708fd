"""Safetensors headers, read strictly and without their weights.

A safetensors file (https://huggingface.co/docs/safetensors) is 8 bytes of little-endian header
length, a JSON header and the data section that the header describes, without a hole. This reader
accepts a subset of what safetensors 0.8 accepts: a header is at most 16 MiB, describes at most
100,000 tensors, repeats no key, has no unknown field, and its shapes are numbers a model could
have. Every other header is one `CheckpointError` that names the file, raised before anything of
the header's claimed size is allocated.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from oomproof.errors import CheckpointError
from oomproof.formats import DType
from oomproof.models.spec import CheckpointTensor
from oomproof.units import MIB, format_bytes

LENGTH_BYTES = 8
"""Bytes of the header length at the beginning of the file."""
MAX_HEADER_BYTES = 16 * MIB
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 32
MAX_DIMENSION = 2**40
MAX_OFFSET = 2**53
"""Beyond this, JSON readers disagree about integers (RFC 8259, section 6)."""

DTYPES = {
    "F64": DType.FLOAT64,
    "F32": DType.FLOAT32,
    "F16": DType.FLOAT16,
    "BF16": DType.BFLOAT16,
    "F8_E4M3": DType.FLOAT8_E4M3FN,
    "F8_E5M2": DType.FLOAT8_E5M2,
    "I64": DType.INT64,
    "I32": DType.INT32,
    "I16": DType.INT16,
    "I8": DType.INT8,
    "U8": DType.UINT8,
    "BOOL": DType.BOOL,
}
"""safetensors' name of an element type → ours."""
SAFETENSORS_NAMES = {dtype.value: name for name, dtype in DTYPES.items()}
"""torch's name of an element type → safetensors'."""

_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_PUNCTUATION = 20 * MAX_TENSORS
"""Commas and brackets of a header; an entry of the usual form has eleven."""


class _Extent(NamedTuple):
    """Where a tensor lies in the data section."""

    begin: int
    end: int
    name: str
    dtype: DType
    shape: tuple[int, ...]


def read_header(path: Path) -> tuple[CheckpointTensor, ...]:
    """The tensors of a safetensors file on disk, in the order of their bytes.

    Raises:
        CheckpointError: The file is absent, not a regular file, truncated, or its header lies.
    """
    location = str(path)
    with open_regular_file(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(LENGTH_BYTES)
        data_begin = header_end(prefix, file_bytes=file_bytes, location=location)
        prefix += file.read(data_begin - LENGTH_BYTES)
    return parse_header(prefix, file=path.name, file_bytes=file_bytes, location=location)


@contextmanager
def open_regular_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading, and refuses what would block or is not a file.

    Raises:
        CheckpointError: It is missing, a dangling link, a folder, a device, or not readable.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(str(path), "is not a file")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        problem = "is a link to a file that is gone" if path.is_symlink() else "is missing"
        raise CheckpointError(str(path), problem, remedy="download it again") from error
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})") from error


def header_end(prefix: bytes, *, file_bytes: int, location: str) -> int:
    """Offset at which a file's header ends and its data begins.

    Args:
        prefix: The file's first 8 bytes, or more.
        file_bytes: Length of the whole file.
        location: Path or URL of the file, for the error.

    Raises:
        CheckpointError: The file is too short for the header it announces, or the header too long.
    """
    if file_bytes < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise CheckpointError(
            location,
            f"is truncated: {min(file_bytes, len(prefix))} bytes, "
            f"a safetensors file begins with {LENGTH_BYTES}",
            remedy="download it again",
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            location,
            f"announces a header of {length:,} bytes, the bound is {format_bytes(MAX_HEADER_BYTES)}"
            f" ({MAX_HEADER_BYTES:,})",
            remedy="is it a safetensors file?",
        )
    end = LENGTH_BYTES + length
    if end > file_bytes:
        raise CheckpointError(
            location,
            f"is truncated: its header ends at byte {end:,}, the file has {file_bytes:,}",
            remedy="download it again",
        )
    return end


def parse_header(
    prefix: bytes, *, file: str, file_bytes: int, location: str | None = None
) -> tuple[CheckpointTensor, ...]:
    """The tensors that a header describes, in the order of their bytes.

    Args:
        prefix: The beginning of the file, at least to the end of its header.
        file: Name that the tensors carry, relative to the checkpoint folder.
        file_bytes: Length of the whole file.
        location: Path or URL of the file, for errors; `file` where it is not given.

    Raises:
        CheckpointError: The header is not exactly what the format allows, or does not describe a
            file of that length.
    """
    where = location or file
    data_begin = header_end(prefix, file_bytes=file_bytes, location=where)
    raw = prefix[LENGTH_BYTES:data_begin]
    if len(prefix) < data_begin:
        raise CheckpointError(
            where, f"is truncated: {len(prefix):,} of its header's {data_begin:,} bytes came"
        )
    if not raw.startswith(b"{"):
        raise CheckpointError(
            where, "has a header that does not begin with '{'", remedy="is it a safetensors file?"
        )
    if (
        raw.count(b'"data_offsets"') > MAX_TENSORS
        or sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_PUNCTUATION
    ):  # parsed, it could take a hundred times its length
        _refuse_count(where)
    header = parse_json_object(raw, what="header", location=where)
    _check_metadata(header.pop("__metadata__", {}), location=where)
    if len(header) > MAX_TENSORS:
        _refuse_count(where)
    extents = sorted(_read_entry(name, entry, location=where) for name, entry in header.items())
    _check_coverage(extents, data_bytes=file_bytes - data_begin, location=where)
    return tuple(
        CheckpointTensor(
            name=extent.name,
            dtype=extent.dtype,
            shape=extent.shape,
            file=file,
            offset_bytes=data_begin + extent.begin,
            size_bytes=extent.end - extent.begin,
        )
        for extent in extents
    )


def parse_json_object(raw: bytes, *, what: str, location: str) -> dict[str, object]:
    """Reads JSON as the standard has it: UTF-8, no key twice, no NaN, one object at the top.

    Args:
        raw: The JSON text. Its size is the caller's to bound.
        what: What the text is, for the error.
        location: Path or URL of the file, for the error.

    Raises:
        CheckpointError: It is anything else.
    """
    try:
        parsed: object = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_parse_integer,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise CheckpointError(location, f"has a {what} that is nested too deeply") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(location, f"has a {what} that is not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(location, f"has a {what} that is not a JSON object")
    return parsed


def shorten(value: object, limit: int = 80) -> str:
    """`repr` of a foreign value, short enough for a message."""
    # A long value is cut before repr so that a hostile megabyte costs nothing.
    text = repr(value[: limit + 1] if isinstance(value, (str, list)) else value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shorten(key)} occurs twice")
            seen.add(key)
    return found


def _parse_integer(text: str) -> int:
    # Python reads -0 as an integer; safetensors' reader does not.
    if len(text) > 20 or text == "-0":
        raise ValueError(f"{shorten(text)} is not a size")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _refuse_count(location: str) -> NoReturn:
    raise CheckpointError(location, f"describes more than {MAX_TENSORS:,} tensors")


def _is_text(value: object) -> bool:
    """Whether a JSON value is a string of whole characters; JSON lets half a surrogate pass."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_metadata(metadata: object, *, location: str) -> None:
    if not isinstance(metadata, dict):
        raise CheckpointError(location, "has a __metadata__ that is not a JSON object")
    for key, value in metadata.items():
        if not (_is_text(key) and _is_text(value)):
            raise CheckpointError(location, f"has a __metadata__ entry {shorten(key)} not a string")


def _read_entry(name: str, entry: object, *, location: str) -> _Extent:
    def refuse(problem: str) -> NoReturn:
        raise CheckpointError(location, f"tensor {shorten(name)} {problem}")

    if not name or not _is_text(name):
        refuse("has a name that is no text")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        refuse(f"must have exactly the fields {', '.join(sorted(_FIELDS))}")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        refuse(f"has dtype {shorten(dtype_name)}, known are {', '.join(DTYPES)}")
    if not _are_whole_numbers(shape, bound=MAX_DIMENSION) or len(shape) > MAX_DIMENSIONS:
        refuse(
            f"has shape {shorten(shape)}, not at most {MAX_DIMENSIONS} whole numbers up to "
            f"{MAX_DIMENSION:,}"
        )
    if not _are_whole_numbers(offsets, bound=MAX_OFFSET) or len(offsets) != 2:
        refuse(f"has data_offsets {shorten(offsets)}, not two whole numbers up to {MAX_OFFSET:,}")
    begin, end = offsets
    size_bytes = prod(shape) * dtype.itemsize
    if end - begin != size_bytes:
        refuse(
            f"of shape {shorten(shape)} in {dtype_name} takes {size_bytes:,} bytes, "
            f"its data_offsets {begin}..{end} span {end - begin:,}"
        )
    return _Extent(begin, end, name, dtype, tuple(shape))


def _are_whole_numbers(value: object, *, bound: int) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= bound for n in value)


def _check_coverage(extents: list[_Extent], *, data_bytes: int, location: str) -> None:
    """Refuses overlaps, holes, and a data section of another length than the header describes."""
    covered = 0
    for extent in extents:
        if extent.begin != covered:
            kind = "overlaps the tensor before it" if extent.begin < covered else "leaves a hole"
            raise CheckpointError(
                location,
                f"tensor {shorten(extent.name)} {kind}: "
                f"it begins at byte {extent.begin:,} of the data, {covered:,} expected",
            )
        covered = extent.end
    if covered > data_bytes:
        raise CheckpointError(
            location,
            f"is truncated: its header describes {covered:,} bytes of data, "
            f"the file has {data_bytes:,}",
            remedy="download it again",
        )
    if covered < data_bytes:
        raise CheckpointError(
            location,
            f"has {data_bytes - covered:,} bytes that no tensor owns: its header describes "
            f"{covered:,} bytes of data, the file has {data_bytes:,}",
        )
