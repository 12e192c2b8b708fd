from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from oomproof.errors import CheckpointError
from oomproof.formats import DType
from oomproof.models.headers import MAX_HEADER_BYTES, MAX_TENSORS, parse_header, read_header

Entry = dict[str, Any]


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def build(header: object, data_bytes: int = 24) -> bytes:
    """A file with this header, given as a value or as JSON text, and that many bytes of data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data_bytes)


def parse(content: bytes) -> tuple[Any, ...]:
    return parse_header(content, file="model.safetensors", file_bytes=len(content))


GOOD = {"a": entry([2, 2], 0, 16), "b": entry([2], 16, 24), "__metadata__": {"format": "pt"}}
GOOD_FILE = build(GOOD)
A = '{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
B = '{"dtype":"F32","shape":[2],"data_offsets":[16,24]}'
HUGE = 2**62

HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty file": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "length only, zero": lambda: bytes(8),
    "length of 100 MB with padding": lambda: (100_000_000).to_bytes(8, "little") + b"{}",
    "length of 2^64 - 1": lambda: b"\xff" * 8 + GOOD_FILE[8:],
    "length beyond the file": lambda: (len(GOOD_FILE)).to_bytes(8, "little") + GOOD_FILE[8:],
    "not JSON": lambda: build(b"{not json}"),
    "JSON list": lambda: build(b"[]"),
    "JSON number": lambda: build(b"7"),
    "leading space": lambda: build(b" " + json.dumps(GOOD).encode()),
    "trailing comma": lambda: build(f'{{"a":{A},"b":{B},}}'.encode()),
    "UTF-16": lambda: build(json.dumps(GOOD).encode("utf-16")),
    "byte order mark": lambda: build(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()),
    "bad UTF-8": lambda: build(b'{"\xff":' + A.encode() + b"}", 16),
    "half a surrogate": lambda: build(b'{"\\ud800":' + A.encode() + b"}", 16),
    "nested 100,000 deep": lambda: build(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "duplicate tensor": lambda: build(f'{{"a":{A},"a":{A}}}'.encode(), 16),
    "duplicate field": lambda: build(
        b'{"a":{"dtype":"F32","shape":[1],"shape":[4],"data_offsets":[0,16]}}', 16
    ),
    "metadata not strings": lambda: build({"__metadata__": {"step": 1}}, 0),
    "metadata a list": lambda: build({"__metadata__": ["pt"]}, 0),
    "metadata null": lambda: build({"__metadata__": None}, 0),
    "unknown dtype": lambda: build({"a": entry([4], 0, 16, "F31")}, 16),
    "dtype not a string": lambda: build({"a": entry([4], 0, 16, ["F32"])}, 16),
    "dtype we do not hold": lambda: build({"a": entry([4], 0, 16, "U32")}, 16),
    "missing field": lambda: build({"a": {"dtype": "F32", "shape": [4]}}, 16),
    "extra field": lambda: build({"a": entry([4], 0, 16) | {"strides": [1]}}, 16),
    "entry not an object": lambda: build({"a": 4}, 16),
    "empty name": lambda: build({"": entry([4], 0, 16)}, 16),
    "negative dimension": lambda: build({"a": entry([-2, -2], 0, 16)}, 16),
    "float dimension": lambda: build({"a": entry([4.0], 0, 16)}, 16),
    "true as a dimension": lambda: build({"a": entry([True, 4], 0, 16)}, 16),
    "minus zero": lambda: build(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[-0,0]}}', 0),
    "NaN dimension": lambda: build(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}', 0),
    "5,000 digits": lambda: build(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', 0
    ),
    "empty tensor of 0 × 2^62": lambda: build({"a": entry([0, HUGE], 0, 0)}, 0),
    "product that overflows to 0": lambda: build({"a": entry([HUGE, 4], 0, 0)}, 0),
    "too many dimensions": lambda: build({"a": entry([1] * 33 + [4], 0, 16)}, 16),
    "shape larger than its span": lambda: build({"a": entry([5], 0, 16)}, 16),
    "shape smaller than its span": lambda: build({"a": entry([3], 0, 16)}, 16),
    "offsets reversed": lambda: build({"a": entry([4], 16, 0)}, 16),
    "three offsets": lambda: build({"a": entry([4], 0, 16) | {"data_offsets": [0, 16, 16]}}, 16),
    "offset beyond the file": lambda: build({"a": entry([4], HUGE, HUGE + 16)}, 16),
    "overlap": lambda: build({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}),
    "hole": lambda: build({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}),
    "hole at the beginning": lambda: build({"a": entry([4], 8, 24)}),
    "truncated data": lambda: GOOD_FILE[:-1],
    "bytes after the data": lambda: GOOD_FILE + b"\0",
    "data without a tensor": lambda: build({}),
    "400,000 tensors": lambda: build(
        b"{" + b",".join(b'"%06d":0' % n for n in range(400_000)) + b"}", 0
    ),
    "200,000 tensors": lambda: build(
        f"{{{','.join(f'{chr(34)}{n}{chr(34)}:{A}' for n in range(200_000))}}}".encode(), 0
    ),
    "more values than any header": lambda: build(b'{"a":[' + b"0," * 4_000_000 + b"0]}", 0),
}


def safetensors_reads(content: bytes) -> dict[str, Entry] | None:
    """safetensors' own view of a file, None where it refuses."""
    try:
        return dict(cast("Any", deserialize)(content))
    except SafetensorError:
        return None


def test_a_good_header_gives_absolute_offsets_in_the_order_of_the_bytes() -> None:
    a, b = parse(GOOD_FILE)
    data_begin = len(GOOD_FILE) - 24
    assert (a.name, a.dtype, a.shape, a.file) == ("a", DType.FLOAT32, (2, 2), "model.safetensors")
    assert (a.offset_bytes, a.size_bytes) == (data_begin, 16)
    assert (b.name, b.offset_bytes, b.size_bytes) == ("b", data_begin + 16, 8)
    assert safetensors_reads(GOOD_FILE) is not None


def test_the_beginning_of_the_file_is_enough() -> None:
    tensors = parse_header(GOOD_FILE[:-24], file="x", file_bytes=len(GOOD_FILE))
    assert [tensor.name for tensor in tensors] == ["a", "b"]
    with pytest.raises(CheckpointError, match="came"):
        parse_header(GOOD_FILE[:-25], file="x", file_bytes=len(GOOD_FILE))


def test_what_safetensors_itself_writes_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {
        str(dtype).removeprefix("torch."): torch.zeros(3, 2).to(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
            *(torch.float8_e4m3fn, torch.float8_e5m2),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        )
    }
    tensors["scalar"] = torch.tensor(1.0)
    tensors["none"] = torch.zeros(0, 7)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = {tensor.name: tensor for tensor in read_header(tmp_path / "model.safetensors")}
    assert read.keys() == tensors.keys()
    assert {name for name in read if name in set(DType)} == set(DType)
    for name, tensor in read.items():
        assert tensor.shape == tuple(tensors[name].shape)
        assert tensor.size_bytes == tensors[name].nbytes
        assert name in {tensor.dtype, "scalar", "none"}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_error_that_names_the_file(case: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[case]())
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors: ") as caught:
        read_header(path)
    assert time.process_time() - started < 1
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "case", ["duplicate tensor", "empty tensor of 0 × 2^62", "extra field", "metadata null"]
)
def test_some_headers_that_safetensors_opens_are_refused(case: str) -> None:
    assert safetensors_reads(HOSTILE[case]()) is not None


def test_a_truncated_file_says_how_many_bytes_there_should_be() -> None:
    with pytest.raises(CheckpointError, match=r"describes 24 bytes of data, the file has 23"):
        parse(GOOD_FILE[:-1])
    with pytest.raises(CheckpointError, match="its header ends at byte"):
        parse(GOOD_FILE[:30])


def test_a_header_of_100_mb_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "padding.safetensors"
    with path.open("wb") as file:
        file.write((99_999_992).to_bytes(8, "little") + b"{}")
        file.truncate(100_000_000)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="99,999,992"):
        read_header(path)
    assert time.process_time() - started < 0.05


def test_the_bounds_themselves_are_allowed() -> None:
    padded = json.dumps(GOOD).encode().ljust(MAX_HEADER_BYTES)
    assert len(parse(build(padded))) == 2
    with pytest.raises(CheckpointError, match="the bound is 16"):
        parse(build(padded + b" "))
    many = {f"layer.{n}.weight": entry([1], n, n + 1, "U8") for n in range(MAX_TENSORS)}
    assert len(parse(build(many, MAX_TENSORS))) == MAX_TENSORS
    many["one more"] = entry([1], MAX_TENSORS, MAX_TENSORS + 1, "U8")
    with pytest.raises(CheckpointError, match="more than 100,000 tensors"):
        parse(build(many, MAX_TENSORS + 1))


def test_3000_tensors_take_milliseconds() -> None:
    content = build({f"model.layers.{n}.weight": entry([1], n, n + 1, "U8") for n in range(3000)})
    fastest = min(_seconds(content) for _ in range(5))
    assert fastest < 0.1  # about 0.02 s on one slow core


def _seconds(content: bytes) -> float:
    started = time.process_time()
    parse_header(content, file="x", file_bytes=len(content) - 24 + 3000)
    return time.process_time() - started


@pytest.mark.parametrize("kind", ["folder", "missing", "dangling link", "pipe"])
def test_what_is_not_a_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    match kind:
        case "folder":
            path.mkdir()
        case "dangling link":
            path.symlink_to("nowhere")
        case "pipe":
            os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (is|cannot)"):
        read_header(path)


def check_verdict(content: bytes) -> None:
    """Ours raises CheckpointError or nothing, and accepts nothing that safetensors refuses."""
    try:
        tensors = parse(content)
    except CheckpointError:
        return
    theirs = safetensors_reads(content)
    assert theirs is not None
    assert {tensor.name: list(tensor.shape) for tensor in tensors} == {
        name: spec["shape"] for name, spec in theirs.items()
    }


QUICK = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@QUICK
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(GOOD_FILE) - 1),
            st.one_of(st.integers(0, 255), st.sampled_from(list(b'0129-.eE{}[]",: \\'))),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_changed_bytes_are_judged_as_safetensors_does_or_stricter(
    changes: list[tuple[int, int]],
) -> None:
    content = bytearray(GOOD_FILE)
    for position, byte in changes:
        content[position] = byte
    check_verdict(bytes(content))


@QUICK
@given(st.integers(0, len(GOOD_FILE)), st.integers(0, 12), st.binary(max_size=12))
def test_cut_and_spliced_files_are_judged_as_safetensors_does_or_stricter(
    position: int, removed: int, inserted: bytes
) -> None:
    check_verdict(GOOD_FILE[:position] + inserted + GOOD_FILE[position + removed :])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-4, 40)
    | st.sampled_from([2**40, 2**53, 2**62, 2**64, 10**30])
    | st.floats()
    | st.sampled_from(["F32", "U8", "F4", "BOOL", "", "pt"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner, max_size=3)
    ),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F4", "U16"]) | VALUES,
        "shape": st.lists(st.integers(0, 4), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2) | VALUES,
    }
)


@QUICK
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__", "\ud800", "é"]), ENTRIES | VALUES
    ),
    st.integers(0, 24),
)
def test_made_up_headers_are_judged_as_safetensors_does_or_stricter(
    header: dict[str, object], data_bytes: int
) -> None:
    check_verdict(build(header, data_bytes))


@QUICK
@given(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=5), st.randoms())
def test_every_well_formed_header_is_read(shapes: list[list[int]], shuffler: Any) -> None:
    header: dict[str, Entry] = {}
    begin = 0
    for number, shape in enumerate(shapes):
        size = 2
        for dimension in shape:
            size *= dimension
        header[f"t{number}"] = entry(shape, begin, begin + size, "BF16")
        begin += size
    names = list(header)
    shuffler.shuffle(names)
    content = build({name: header[name] for name in names}, begin)
    assert len(parse(content)) == len(shapes)
    check_verdict(content)
