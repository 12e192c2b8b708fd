"""Small checkpoints, written by hand so that no test needs torch for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8}
Shapes = dict[str, tuple[int, ...]]
EMBEDDING: Shapes = {"model.embed_tokens.weight": (16, 8)}
REST: Shapes = {"lm_head.weight": (16, 8), "model.norm.weight": (8,)}


def safetensors_bytes(shapes: Shapes) -> bytes:
    """A file of bfloat16 zeros."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2
        for dimension in shape:
            end = begin + (end - begin) * dimension
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(end)


def single_files() -> dict[str, bytes]:
    """The files of a model whose weights are one file."""
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors_bytes(
            EMBEDDING | {"model.norm.weight": REST["model.norm.weight"]}
        ),
    }


def sharded_files() -> dict[str, bytes]:
    """The files of a model whose weights are two shards and an index."""
    shards: dict[str, Shapes] = {
        "model-00001-of-00002.safetensors": EMBEDDING,
        "model-00002-of-00002.safetensors": REST,
    }
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
    } | {file: safetensors_bytes(shapes) for file, shapes in shards.items()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Writes files into a new folder and returns it."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_single(folder: Path) -> Path:
    """A folder with `single_files`."""
    return write_files(folder, single_files())


def write_sharded(folder: Path) -> Path:
    """A folder with `sharded_files`."""
    return write_files(folder, sharded_files())
