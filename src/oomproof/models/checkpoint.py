"""What a folder and a hub repository have in common: which files are a model, do they agree.

Weights are `model.safetensors`, or shards that `model.safetensors.index.json` lists: transformers'
layout, and its order of preference. Nothing here opens a file; models/folder.py and models/hub.py
bring the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from oomproof.errors import CheckpointError
from oomproof.models.headers import MAX_TENSORS, parse_json_object, shorten
from oomproof.models.spec import CheckpointSpec, CheckpointTensor
from oomproof.units import MIB

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
MAX_CONFIG_BYTES = 16 * MIB
MAX_INDEX_BYTES = 64 * MIB
MAX_INDEX_TENSORS = 10 * MAX_TENSORS
MAX_SHARDS = 10_000

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
)
"""Files that transformers builds a tokenizer from, none of them code."""
_VOCABULARIES = {
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
}

_SHARD_NAME = re.compile(r"[\w.-]+", re.ASCII)
_NUMBERED = re.compile(r"(?P<stem>.+)-\d+-of-(?P<total>\d+)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One safetensors file of a checkpoint, by its header."""

    file: str
    """Name relative to the checkpoint folder."""
    size_bytes: int
    tensors: tuple[CheckpointTensor, ...]


def find_weights(names: Collection[str], *, location: str) -> Literal["single", "sharded"] | None:
    """How the weights among these files are laid out; None where there are none of any kind.

    Args:
        names: Every file of the folder or repository, top level.
        location: The folder or repository, for errors.

    Raises:
        CheckpointError: There are weights, but of a kind that is not read here.
    """
    if SINGLE_FILE in names:
        return "single"
    if INDEX_FILE in names:
        return "sharded"
    strangers = sorted(name for name in names if name.endswith(".safetensors"))
    if strangers:
        raise CheckpointError(
            location,
            f"has {shorten(strangers[0])} but neither {SINGLE_FILE} nor {INDEX_FILE}",
            remedy="save it with transformers' save_pretrained",
        )
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        raise CheckpointError(
            f"{location}/{pickles[0]}",
            "is a pickle checkpoint, which can run code when it is opened, and is not read",
            remedy=(
                "use a revision with safetensors, or, of a folder, --allow-pickle: another process "
                "then reads its tensors and nothing else"
                if {PICKLE_FILE, PICKLE_INDEX_FILE} & set(names)
                else "use a revision with safetensors, or convert it where you trust it"
            ),
        )
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        raise CheckpointError(
            f"{location}/{ggufs[0]}",
            "is a llama.cpp file, which is not read here",
            remedy="use the safetensors repository that it was made from",
        )
    return None


def missing_config(names: Collection[str], *, location: str) -> CheckpointError:
    """The error for a folder or repository without config.json, with what may explain it."""
    if "adapter_config.json" in names:
        return CheckpointError(
            f"{location}/{CONFIG_FILE}",
            "is missing, this is an adapter",
            remedy="give the base model that adapter_config.json names",
        )
    if "params.json" in names:
        return CheckpointError(
            f"{location}/{CONFIG_FILE}",
            "is missing, params.json belongs to the original format",
            remedy="use the repository in transformers' format",
        )
    if not any(name.endswith((".safetensors", ".json", *_PICKLES)) for name in names):
        return CheckpointError(location, f"holds no model: no {CONFIG_FILE}, no safetensors file")
    return CheckpointError(f"{location}/{CONFIG_FILE}", "is missing")


def has_tokenizer(names: Collection[str]) -> bool:
    """Whether these files hold a vocabulary."""
    return not _VOCABULARIES.isdisjoint(names)


def parse_index(raw: bytes, *, location: str, ending: str = ".safetensors") -> dict[str, str]:
    """Tensor name → shard file, from the bytes of model.safetensors.index.json.

    Args:
        raw: The file's content.
        location: Its path, for errors.
        ending: Of every shard's name.

    Raises:
        CheckpointError: It is no such index, or names a shard outside its own folder.
    """
    index = parse_json_object(raw, what="content", location=location)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(location, "has no weight_map of tensor names to files")
    if len(weight_map) > MAX_INDEX_TENSORS:
        raise CheckpointError(location, f"lists more than {MAX_INDEX_TENSORS:,} tensors")
    checked: dict[str, str] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(location, f"gives tensor {shorten(tensor)} no file name")
        checked[tensor] = file
    files = set(checked.values())
    for file in files:
        if "/" in file or "\\" in file:
            raise CheckpointError(
                location,
                f"names {shorten(file)}, a shard path that leaves the folder",
                remedy="use a checkpoint you trust",
            )
        if not _SHARD_NAME.fullmatch(file) or not file.endswith(ending) or file == ending:
            raise CheckpointError(
                location, f"names {shorten(file)}, which is not a plain *{ending} file name"
            )
    if len(files) > MAX_SHARDS:
        raise CheckpointError(location, f"names more than {MAX_SHARDS:,} shards")
    return checked


def shard_files(
    weight_map: Mapping[str, str], names: Collection[str], *, location: str
) -> tuple[str, ...]:
    """The shards that an index names, in order, after comparing them with the files there are.

    Raises:
        CheckpointError: A shard is missing, or the index leaves out a shard of its own series.
    """
    listed = sorted(set(weight_map.values()))
    for file in listed:
        if file not in names:
            raise CheckpointError(
                f"{location}/{file}",
                f"is missing, {INDEX_FILE} names it",
                remedy="download it again",
            )
    series = {_series(file) for file in listed} - {None}
    for name in sorted(set(names) - set(listed)):
        if _series(name) in series:
            raise CheckpointError(
                f"{location}/{INDEX_FILE}", f"does not name the shard {name} beside it"
            )
    return tuple(listed)


def assemble(
    shards: Sequence[Shard], *, weight_map: Mapping[str, str] | None, location: str
) -> CheckpointSpec:
    """One checkpoint from its shards, after comparing them with the index.

    Args:
        shards: Every shard, in the order of their names.
        weight_map: The index, None for a single file.
        location: The folder or repository, for errors.

    Raises:
        CheckpointError: A tensor is in two shards, not in the shard that the index says, or not in
            the index.
    """
    home: dict[str, str] = {}
    for tensor in _tensors(shards):
        if tensor.name in home:
            raise CheckpointError(
                f"{location}/{tensor.file}",
                f"tensor {shorten(tensor.name)} is in {home[tensor.name]} too",
            )
        home[tensor.name] = tensor.file
    if not home:
        raise CheckpointError(f"{location}/{shards[0].file}", "holds no tensor")
    if weight_map is not None and weight_map != home:
        _explain_difference(weight_map, home, location=location)
    return CheckpointSpec(
        tensors=tuple(_tensors(shards)),
        files=tuple((shard.file, shard.size_bytes) for shard in shards),
    )


def _tensors(shards: Iterable[Shard]) -> Iterable[CheckpointTensor]:
    return (tensor for shard in shards for tensor in shard.tensors)


def _series(file: str) -> tuple[str, str] | None:
    """What the shards of one save share: ("model", "00003") of model-00001-of-00003."""
    match = _NUMBERED.fullmatch(file)
    return (match["stem"], match["total"]) if match else None


def _explain_difference(
    weight_map: Mapping[str, str], home: Mapping[str, str], *, location: str
) -> None:
    for tensor, file in weight_map.items():
        if home.get(tensor) != file:
            found = f"it is in {home[tensor]}" if tensor in home else "no shard has it"
            raise CheckpointError(
                f"{location}/{file}",
                f"does not hold tensor {shorten(tensor)} that {INDEX_FILE} puts there, {found}",
            )
    for tensor, file in home.items():
        if tensor not in weight_map:
            raise CheckpointError(
                f"{location}/{INDEX_FILE}", f"does not list tensor {shorten(tensor)} of {file}"
            )
