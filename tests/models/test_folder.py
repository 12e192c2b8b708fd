from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oomproof.errors import CheckpointError, InputError, ModelNotFoundError
from oomproof.formats import DType
from oomproof.models.folder import read_folder
from tests.models.safetensors_files import write_sharded, write_single

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_single(tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "sharded")


def test_a_single_file_is_read_without_its_weights(single: Path) -> None:
    contents = read_folder(single)
    assert contents.path == single
    assert json.loads(contents.config)["model_type"] == "llama"
    assert contents.config_file == str(single / "config.json")
    assert contents.has_tokenizer
    assert contents.checkpoint is not None
    assert contents.checkpoint.files == (
        ("model.safetensors", (single / "model.safetensors").stat().st_size),
    )
    embedding, norm = contents.checkpoint.tensors
    assert (embedding.name, embedding.dtype) == ("model.embed_tokens.weight", DType.BFLOAT16)
    assert norm.offset_bytes == embedding.offset_bytes + embedding.size_bytes


def test_shards_are_read_in_the_order_of_their_names(sharded: Path) -> None:
    checkpoint = read_folder(sharded).checkpoint
    assert checkpoint is not None
    assert [file for file, _ in checkpoint.files] == [FIRST, SECOND]
    assert [tensor.file for tensor in checkpoint.tensors] == [FIRST, SECOND, SECOND]
    assert checkpoint.total_bytes == sum(size for _, size in checkpoint.files)


def test_the_hub_caches_layout_of_links_is_read(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    checkpoint = read_folder(snapshot).checkpoint
    assert checkpoint is not None
    assert len(checkpoint.tensors) == 3


def test_a_single_file_is_preferred_to_an_index(single: Path) -> None:
    (single / INDEX).write_text("not read")
    assert read_folder(single).checkpoint is not None


def test_a_config_alone_can_be_planned(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "tokenizer.json").unlink()
    contents = read_folder(single)
    assert contents.checkpoint is None
    assert not contents.has_tokenizer


def test_other_weights_beside_the_shards_are_left_alone(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"another copy")
    (sharded / "pytorch_model.bin").write_bytes(b"another copy")
    (sharded / "model-00001-of-00004.safetensors").write_bytes(b"another save")
    assert read_folder(sharded).checkpoint is not None


Damage = Callable[[Path], object]


def edit_index(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def name_shard(name: str) -> Damage:
    return edit_index(lambda index: index["weight_map"].update({"model.norm.weight": name}))


def cut(file: str, removed_bytes: int) -> Damage:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - removed_bytes)


def append(file: str) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes() + b"\0")


def replace(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


def remove(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def dangle(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to("../blobs/gone")

    return damage


def become_folder(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def swap_shards(folder: Path) -> None:
    first = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes((folder / SECOND).read_bytes())
    (folder / SECOND).write_bytes(first)


def copy_shard(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / FIRST).read_bytes())


def grow_config(folder: Path) -> None:
    os.truncate(folder / "config.json", 17 * 1024**2)


DAMAGED: dict[str, tuple[Damage, str, str]] = {
    "config missing": (remove("config.json"), "config.json", "is missing"),
    "config a folder": (become_folder("config.json"), "config.json", "not a file"),
    "config a dangling link": (dangle("config.json"), "config.json", "link to a file that is gone"),
    "config too large": (grow_config, "config.json", "larger than 16"),
    "shard missing": (remove(SECOND), SECOND, "is missing"),
    "shard a dangling link": (dangle(FIRST), FIRST, "link to a file that is gone"),
    "shard a folder": (become_folder(FIRST), FIRST, "not a file"),
    "shard truncated by a byte": (cut(SECOND, 1), SECOND, "truncated"),
    "shard truncated in its header": (lambda f: os.truncate(f / FIRST, 20), FIRST, "truncated"),
    "shard empty": (lambda f: os.truncate(f / FIRST, 0), FIRST, "truncated"),
    "shard with bytes after it": (append(FIRST), FIRST, "no tensor owns"),
    "shard an LFS pointer": (
        replace(FIRST, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        FIRST,
        "announces a header",
    ),
    "shards swapped": (swap_shards, FIRST, "does not hold"),
    "shard copied over another": (copy_shard, SECOND, "too"),
    "index not JSON": (replace(INDEX, b"{"), INDEX, "not valid JSON"),
    "index a list": (replace(INDEX, b"[]"), INDEX, "not a JSON object"),
    "index with a key twice": (
        replace(INDEX, b'{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}'),
        INDEX,
        "occurs twice",
    ),
    "index without a map": (replace(INDEX, b'{"metadata":{}}'), INDEX, "no weight_map"),
    "index with an empty map": (replace(INDEX, b'{"weight_map":{}}'), INDEX, "no weight_map"),
    "index with a number": (
        edit_index(lambda index: index["weight_map"].update({"model.norm.weight": 2})),
        INDEX,
        "no file name",
    ),
    "index drops a tensor": (
        edit_index(lambda index: index["weight_map"].pop("model.norm.weight")),
        INDEX,
        "does not list tensor 'model.norm.weight'",
    ),
    "index drops a shard": (
        edit_index(
            lambda index: [
                index["weight_map"].pop(name) for name in ("model.norm.weight", "lm_head.weight")
            ]
        ),
        INDEX,
        f"does not name the shard {SECOND}",
    ),
    "index invents a tensor": (
        edit_index(lambda index: index["weight_map"].update({"made.up": FIRST})),
        FIRST,
        "no shard has it",
    ),
    "index leaves the folder": (name_shard(f"../{SECOND}"), INDEX, "leaves the folder"),
    "index is absolute": (name_shard(f"/tmp/{SECOND}"), INDEX, "leaves the folder"),
    "index enters a folder": (name_shard(f"sub/{SECOND}"), INDEX, "leaves the folder"),
    "index has a Windows path": (name_shard(f"..\\{SECOND}"), INDEX, "leaves the folder"),
    "index names a pickle": (name_shard("pytorch_model.bin"), INDEX, "not a plain"),
    "index names a line break": (name_shard("a.safetensors\n"), INDEX, "not a plain"),
    "index names a null": (name_shard("a\0.safetensors"), INDEX, "not a plain"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_one_error_that_names_the_file(case: str, sharded: Path) -> None:
    damage, file, problem = DAMAGED[case]
    damage(sharded)
    with pytest.raises(CheckpointError) as caught:
        read_folder(sharded)
    assert caught.value.file == str(sharded / file)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def only(*files: str) -> Damage:
    def damage(folder: Path) -> None:
        for file in folder.iterdir():
            if file.name != "config.json":
                file.unlink()
        for name in files:
            (folder / name).write_bytes(b"\x80\x04.")

    return damage


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("pytorch_model.bin", "pickle"),
        ("model.pt", "pickle"),
        ("model-q4_k_m.gguf", "llama.cpp"),
        ("consolidated.safetensors", "neither"),
    ],
)
def test_weights_of_another_kind_are_refused_with_a_way_out(
    file: str, problem: str, single: Path
) -> None:
    only(file)(single)
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_folder(single)
    assert file in str(caught.value)
    assert caught.value.remedy


def test_a_checkpoint_without_a_tensor_is_refused(single: Path) -> None:
    (single / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="holds no tensor"):
        read_folder(single)


@pytest.mark.parametrize(
    ("present", "problem"),
    [
        (None, "holds no model"),
        ("adapter_config.json", "this is an adapter"),
        ("params.json", "original format"),
        ("notes.txt", "holds no model"),
    ],
)
def test_a_folder_without_a_config_says_what_it_may_be(
    present: str | None, problem: str, tmp_path: Path
) -> None:
    if present:
        (tmp_path / present).write_text("{}")
    with pytest.raises(CheckpointError, match=problem):
        read_folder(tmp_path)


def test_a_path_that_is_no_folder_is_refused(single: Path, monkeypatch: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        read_folder(single / "nowhere")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        read_folder(single / "model.safetensors")
    with pytest.raises(InputError, match="null"):
        read_folder(Path("a\0b"))

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be listed \(Permission denied\)"):
        read_folder(single)
