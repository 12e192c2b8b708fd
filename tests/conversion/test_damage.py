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

from oomproof.errors import CheckpointError, ConfigError, LoadError
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


def _not_a_number(path: Path) -> None:
    """In the last value of a tensor: a weight, or in 4 bits a scale."""
    raw = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:length])
    name = next(one for one in entries if one.endswith(("nested_absmax", "_proj.weight")))
    end = length + entries[name]["data_offsets"][1]
    raw[end - 2 : end] = b"\xc0\x7f"  # the upper half of a float32, or all of a bfloat16
    path.write_bytes(raw)


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
    "NaN": (lambda folder: _not_a_number(folder / SHARD), "holds a value that is not finite"),
    "a link to nothing": (
        lambda folder: _link_to_nothing(folder / SHARD),
        f"{SHARD}: is a link to a file that is gone",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("stored", ["16 bits", "4 bits"])
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_damaged_folder_is_refused_with_the_file_named(
    engine: str, stored: str, damage: str, whole: Path, tmp_path: Path
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
        load(folder, engine=engine, worker=False),
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


def test_what_is_read_after_a_harmless_change_is_the_same(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "copy")
    path = folder / "model.safetensors"
    rewritten(path, lambda header: header["__metadata__"].update(note="x" * 1000))
    made = files_of(quantized(tmp_path / "one", folder))
    expected = files_of(quantized(tmp_path / "other", SOURCE))
    assert made["model.safetensors"] == expected["model.safetensors"]
