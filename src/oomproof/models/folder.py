"""A model in a local folder: its config.json and what its safetensors headers say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oomproof.errors import CheckpointError, ModelNotFoundError
from oomproof.models.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    SINGLE_FILE,
    Shard,
    assemble,
    find_weights,
    has_tokenizer,
    missing_config,
    parse_index,
    shard_files,
)
from oomproof.models.headers import open_regular_file, read_header
from oomproof.models.spec import CheckpointSpec
from oomproof.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderContents:
    """What a model folder holds, before a weight is read."""

    path: Path
    config: bytes
    """config.json as it lies there; models/config.py reads it."""
    config_file: str
    """Path of config.json, for errors."""
    checkpoint: CheckpointSpec | None
    """None where the folder has no weights: it can be planned, not loaded."""
    has_tokenizer: bool


def read_folder(path: Path) -> FolderContents:
    """Reads config.json and the headers of every shard, and nothing else.

    Raises:
        ModelNotFoundError: There is no such folder.
        CheckpointError: The folder's files are missing, damaged, unsafe, or disagree.
    """
    names = list_folder(path)
    if CONFIG_FILE not in names:
        raise missing_config(names, location=str(path))
    config_path = path / CONFIG_FILE
    return FolderContents(
        path=path,
        config=read_bounded(config_path, bound_bytes=MAX_CONFIG_BYTES),
        config_file=str(config_path),
        checkpoint=_read_checkpoint(path, names),
        has_tokenizer=has_tokenizer(names),
    )


def list_folder(path: Path) -> frozenset[str]:
    """Names of everything in a folder, top level.

    Raises:
        ModelNotFoundError: There is no such folder.
        CheckpointError: It cannot be listed.
    """
    try:
        return frozenset(entry.name for entry in path.iterdir())
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path}: no such folder") from error
    except NotADirectoryError as error:
        raise ModelNotFoundError(
            f"{path}: is a file, not a model folder", remedy=f"give {path.parent}"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(str(path), f"cannot be listed ({reason})") from error


def read_bounded(path: Path, *, bound_bytes: int) -> bytes:
    """The bytes of a small file.

    Raises:
        CheckpointError: It cannot be read, or is larger than the bound.
    """
    with open_regular_file(path) as file:
        content = file.read(bound_bytes + 1)
    if len(content) > bound_bytes:
        raise CheckpointError(str(path), f"is larger than {format_bytes(bound_bytes)}")
    return content


def read_shard(path: Path) -> Shard:
    """One safetensors file, by its header.

    Raises:
        CheckpointError: It cannot be read, or its header lies.
    """
    tensors = read_header(path)
    return Shard(file=path.name, size_bytes=path.stat().st_size, tensors=tensors)


def _read_checkpoint(path: Path, names: frozenset[str]) -> CheckpointSpec | None:
    layout = find_weights(names, location=str(path))
    if layout is None:
        return None
    if layout == "single":
        return assemble([read_shard(path / SINGLE_FILE)], weight_map=None, location=str(path))
    index_path = path / INDEX_FILE
    weight_map = parse_index(
        read_bounded(index_path, bound_bytes=MAX_INDEX_BYTES), location=str(index_path)
    )
    # A shard's name is plain (parse_index saw to it); what it links to is the user's own doing,
    # as in the hub's cache, where every file is a link to ../../blobs.
    files = shard_files(weight_map, names, location=str(path))
    shards = [read_shard(path / file) for file in files]
    return assemble(shards, weight_map=weight_map, location=str(path))
