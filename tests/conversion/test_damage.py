"""Damaged checkpoints: refused with the file named, or read right; no crash, no hang."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from oomproof.errors import CheckpointError, ConfigError, LoadError, OomproofError
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec
from oomproof.session import load, quantize
from tests.compat.checkpoints import copy_of_tiny, edit_json
from tests.conversion.jobs import SOURCE, files_of, in_shards, quantized

LONGEST_S = 1.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in 4 bits and two shards."""
    folder = tmp_path_factory.mktemp("whole")
    return quantized(folder / "out", in_shards(folder / "source", 2), format="nf4-dq")


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_flipped_bit_anywhere_is_refused_when_it_is_loaded(
    engine: str, whole: Path, tmp_path: Path
) -> None:
    chosen = random.Random(1)
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    shards = sorted(folder.glob("*.safetensors"))
    for _ in range(4 if engine == "native" else 1):
        path = chosen.choice(shards)
        content = bytearray(path.read_bytes())
        place = chosen.randrange(len(content) // 2, len(content))
        content[place] ^= 1 << chosen.randrange(8)
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as refused, load(folder, engine=engine):
            pass
        assert str(path) in str(refused.value)
        path.write_bytes(before)
    with load(folder, engine=engine) as model:
        assert model.generate("It was", temperature=0, max_new_tokens=2)


def rewritten(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """A safetensors file with its header changed and its values as they were."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    found = edit(header)
    text = found if isinstance(found, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _overlap(header: dict[str, Any]) -> None:
    entries = [one["data_offsets"] for name, one in header.items() if name != "__metadata__"]
    first, second = sorted(entries)[:2]
    second[:] = [first[0], first[0] + second[1] - second[0]]


def _twice(header: dict[str, Any]) -> bytes:
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    return (text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode()


def _escape(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../" + index["weight_map"][name]
    path.write_text(json.dumps(index))


def _link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


SHARD = "model-00002-of-00002.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: is missing"),
    "empty shard": (lambda folder: (folder / SHARD).write_bytes(b""), f"{SHARD}: is truncated"),
    "cut shard": (
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-7]),
        f"{SHARD}: is truncated",
    ),
    "longer shard": (
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes() + b"0"),
        f"{SHARD}: has 1 bytes that no tensor owns",
    ),
    "overlap": (lambda folder: rewritten(folder / SHARD, _overlap), f"{SHARD}: tensor .*overlap"),
    "key twice": (lambda folder: rewritten(folder / SHARD, _twice), f"{SHARD}: .*occurs twice"),
    "path escape": (_escape, "index.json: names .*a shard path that leaves the folder"),
    "more layers": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=7),
        "the weights lack|which the weights lack",
    ),
    "fewer layers": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=4),
        "unexpected parameters|which config.json does not describe",
    ),
    "wider": (
        lambda folder: edit_json(folder / "config.json", intermediate_size=1024),
        "has|elements",
    ),
    "two shards in one": (
        lambda folder: shutil.copyfile(folder / SHARD, folder / SHARD.replace("2-of", "1-of")),
        "is in .* too|does not hold",
    ),
    "a link to nothing": (
        lambda folder: _link_to_nothing(folder / SHARD),
        f"{SHARD}: is a link to a file that is gone",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("stored", ["16 bits", "4 bits"])
def test_a_damaged_folder_is_refused_with_the_file_named(
    stored: str, damage: str, whole: Path, tmp_path: Path
) -> None:
    apply, message = DAMAGES[damage]
    if stored == "4 bits":
        folder = Path(shutil.copytree(whole, tmp_path / "copy"))
        (folder / "oomproof-manifest.json").unlink()
    else:
        folder = in_shards(tmp_path / "copy", 2)
    apply(folder)
    begin_s = time.process_time()
    with (
        pytest.raises((CheckpointError, ConfigError, LoadError), match=message),
        load(folder, engine="native"),
    ):
        pass
    if stored == "16 bits":
        with pytest.raises((CheckpointError, ConfigError), match=message):
            quantize(folder, tmp_path / "out", device="cpu")
        assert not (tmp_path / "out").exists()
    assert time.process_time() - begin_s < 2 * LONGEST_S


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "schema": (lambda one: one.update(schema=2), "is not of schema 1"),
    "no job": (lambda one: one.pop("job"), "lacks job or files"),
    "no list": (lambda one: one.update(files={}), "lacks job or files"),
    "escape": (lambda one: one["files"][0].update(file="../x"), "is not a plain file name"),
    "itself": (lambda one: one["files"][0].update(file=".."), "is not a plain file name"),
    "no digest": (lambda one: one["files"][0].update(sha256="x"), "has no size and digest"),
    "extra field": (lambda one: one["files"][0].update(more=1), "that is no file"),
    "gone": (lambda one: one["files"][0].update(file="gone"), "gone: is missing"),
}


@pytest.mark.parametrize("damage", list(MANIFESTS))
def test_a_damaged_manifest_is_refused(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    path = folder / "oomproof-manifest.json"
    content = json.loads(path.read_text())
    edit, message = MANIFESTS[damage]
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message), load(folder, engine="native"):
        pass


_JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**53,
        2**64,
        1.5,
        "",
        "F32",
        "U8",
        "x" * 300,
        [],
        {},
        [0],
        [1, 2],
    ]
)


def mutate(header: dict[str, Any], data: st.DataObject) -> None:
    """One change to a header, mostly of a kind that a reader must find."""
    names = [name for name, entry in header.items() if _is_whole(entry)]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    kind = data.draw(
        st.sampled_from(["drop", "rename", "swap", "dtype", "shape", "offsets", "field", "entry"])
    )
    entry = header[name]
    if kind == "drop":
        header.pop(name)
    elif kind == "rename":
        header[data.draw(st.text(max_size=20))] = header.pop(name)
    elif kind == "swap":
        other = data.draw(st.sampled_from(names))
        header[name], header[other] = header[other], header[name]
    elif kind == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(["F32", "BF16", "F16", "U8", "I8", "F64", "Q4"]))
    elif kind == "shape":
        shape = entry["shape"]
        shape = data.draw(
            st.sampled_from([shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [-1], [0]])
        )
        entry["shape"] = shape
    elif kind == "offsets":
        index = data.draw(st.integers(0, 1))
        entry["data_offsets"][index] += data.draw(st.integers(-300, 300))
    elif kind == "field":
        entry[data.draw(st.sampled_from([*entry, "more"]))] = data.draw(_JUNK)
    else:
        header[name] = data.draw(_JUNK)


def _is_whole(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    return (
        isinstance(shape, list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(one) is int for one in offsets)
    )


class Bench:
    """A folder whose one file is changed and put back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "model.safetensors"
        self.raw = self.path.read_bytes()

    def check(self, data: st.DataObject) -> None:
        """Refused in one error of ours, or planned with exactly the headers that are there."""
        self.path.write_bytes(self.raw)
        changes = data.draw(st.integers(1, 3))

        def edit(header: dict[str, Any]) -> None:
            for _ in range(changes):
                mutate(header, data)

        rewritten(self.path, edit)
        # Of this process: the machine may be busy with others.
        begin_s = time.process_time()
        spec, refusal = self._read()
        assert time.process_time() - begin_s < LONGEST_S
        if spec is None:
            assert str(self.folder) in refusal or "model.safetensors" in refusal
            assert "\n" not in refusal
            return
        assert spec.checkpoint is not None
        for tensor in spec.checkpoint.tensors:
            assert tensor.offset_bytes + tensor.size_bytes <= self.path.stat().st_size

    def _read(self) -> tuple[ModelSpec | None, str]:
        try:
            return resolve(str(self.folder)), ""
        except OomproofError as error:
            return None, str(error)


@pytest.fixture(scope="module", params=["16 bits", "4 bits"])
def bench(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    if request.param == "16 bits":
        return Bench(copy_of_tiny(folder / "copy"))
    out = quantized(folder / "out")
    (out / "oomproof-manifest.json").unlink()
    return Bench(out)


_RELAXED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@hypothesis_settings(max_examples=250, deadline=None, suppress_health_check=_RELAXED)
@given(data=st.data())
def test_mutated_headers_are_refused_or_read_right(bench: Bench, data: st.DataObject) -> None:
    bench.check(data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@hypothesis_settings(max_examples=5000, deadline=None, suppress_health_check=_RELAXED)
@given(data=st.data())
def test_10_000_mutated_headers_are_refused_or_read_right(
    bench: Bench, data: st.DataObject
) -> None:
    bench.check(data)


def test_what_is_read_after_a_harmless_change_is_the_same(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "copy")
    path = folder / "model.safetensors"
    rewritten(path, lambda header: header["__metadata__"].update(note="x" * 1000))
    made = files_of(quantized(tmp_path / "one", folder))
    expected = files_of(quantized(tmp_path / "other", SOURCE))
    assert made["model.safetensors"] == expected["model.safetensors"]
