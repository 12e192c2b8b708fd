"""Every byte of a quantized checkpoint's shards but the values, before a weight is read.

Shards are safetensors files in which what bitsandbytes' 4-bit layers are loaded from has the names
that transformers gives it. A shard of the output holds tensors of one shard of the source: so a
source shard can be forgotten as soon as what came from it is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from oomproof.errors import CheckpointError, InputError
from oomproof.formats import (
    BLOCK_SIZE,
    FIT,
    FORMATS,
    NESTED_BLOCK_SIZE,
    SEARCHED_FORMATS,
    DType,
    Format,
)
from oomproof.models.checkpoint import SINGLE_FILE
from oomproof.models.headers import LENGTH_BYTES, SAFETENSORS_NAMES
from oomproof.models.quantization import PLAIN_DTYPES
from oomproof.models.spec import CheckpointSpec, CheckpointTensor, ModelSpec, Role
from oomproof.models.stored_parts import bitsandbytes_parts
from oomproof.units import GIB, MIB, round_up

QUANTIZE_FORMATS = tuple(
    name
    for name, one in FORMATS.items()
    if one.quant_type is not None and one.block_size == BLOCK_SIZE
)
"""What a checkpoint can be written in: formats that transformers reads too. bitsandbytes takes no
blocks of 16."""
QUANTIZE_DTYPES = (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32)
DEFAULT_SHARD_BYTES = GIB
MIN_SHARD_BYTES = MIB
_OFFSET_CHARACTERS = 24
"""The longest that Python writes a float32."""
_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputTensor:
    """Where a tensor lies in its shard."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset_bytes: int
    """From the beginning of the file."""

    @property
    def size_bytes(self) -> int:
        """Stored bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """One tensor of the source, and whether it is quantized or only cast."""

    source: CheckpointTensor
    quantized: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputShard:
    """One file of the output."""

    file: str
    source_file: str
    """The shard that all its tensors come from."""
    conversions: tuple[Conversion, ...]
    tensors: tuple[OutputTensor, ...]
    """In the order of their bytes."""
    header: bytes
    """The file up to its first value."""

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        """What is read for it."""
        return sum(one.source.size_bytes for one in self.conversions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """All shards of the output."""

    format: Format
    dtype: DType
    """Of what is not quantized, and what weights are computed in."""
    search: bool
    """Whether block scales are searched; else they are bitsandbytes' own."""
    shards: tuple[OutputShard, ...]

    @property
    def block_scales(self) -> str:
        """How they were chosen, in a word for the files that say what is in a folder."""
        return "searched" if self.search else "absmax"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    name: str
    dtype: DType
    shape: tuple[int, ...]


def lay_out(
    spec: ModelSpec,
    format_name: str,
    dtype: DType,
    *,
    search: bool | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Output:
    """The output's files.

    Args:
        spec: The model, with the headers of its checkpoint.
        format_name: One of QUANTIZE_FORMATS.
        dtype: One of QUANTIZE_DTYPES.
        search: Whether block scales are searched; None where the format has some.
        shard_bytes: The most that a shard has, unless one tensor alone has more.

    Raises:
        InputError: The model cannot be written so.
        CheckpointError: The checkpoint has tensors that are none of the model's.
    """
    refuse_unquantizable(spec, format_name)
    weight_format = FORMATS[format_name]
    searched = searches(format_name, search)
    assert spec.checkpoint is not None
    conversions = _conversions(spec, spec.checkpoint)
    groups = list(_groups(conversions, weight_format, dtype, shard_bytes))
    shards = tuple(
        _shard(_file_name(number, len(groups)), group, weight_format, dtype)
        for number, group in enumerate(groups, 1)
    )
    return Output(format=weight_format, dtype=dtype, search=searched, shards=shards)


def searches(format_name: str, asked: bool | None) -> bool:
    """Whether block scales are searched; None asks for it where there are some.

    Raises:
        InputError: It was asked for, and the format has none.
    """
    has_some = format_name in SEARCHED_FORMATS
    if asked and not has_some:
        raise InputError(
            f"{format_name} has no block scales to search",
            remedy="leave --search out, or use one of "
            + ", ".join(name for name in QUANTIZE_FORMATS if name in SEARCHED_FORMATS),
        )
    return has_some and asked is not False


def lay_out_plain(
    checkpoint: CheckpointSpec, dtype: DType, *, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> tuple[OutputShard, ...]:
    """The shards of a checkpoint that is written in one dtype, every tensor as it is named.

    Args:
        checkpoint: Of the source.
        dtype: One of QUANTIZE_DTYPES.
        shard_bytes: The most that a shard has, unless one tensor alone has more.

    Raises:
        CheckpointError: A tensor holds no floating-point numbers.
    """
    conversions = []
    for source in sorted(checkpoint.tensors, key=lambda one: (one.file, one.offset_bytes)):
        if source.name.endswith(".rotary_emb.inv_freq"):
            continue
        if source.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                source.file, f"{source.name!r} holds {source.dtype}, not 16- or 32-bit floats"
            )
        conversions.append(Conversion(source=source, quantized=False))
    unused = FORMATS["nf4"]
    groups = list(_groups(conversions, unused, dtype, shard_bytes))
    return tuple(
        _shard(_file_name(number, len(groups)), group, unused, dtype)
        for number, group in enumerate(groups, 1)
    )


def refuse_unquantizable(spec: ModelSpec, format_name: str) -> None:
    """Refuses what would not come out as a checkpoint that transformers reads.

    Raises:
        InputError: An unknown format, or one without such a form; a source that is quantized
            already; a model whose checkpoint has other names than its modules.
    """
    if format_name not in QUANTIZE_FORMATS:
        shown, ours = format_name[:40], f"use one of {', '.join(QUANTIZE_FORMATS)}"
        if format_name not in (*FORMATS, FIT):
            raise InputError(f"format {shown!r} is unknown", remedy=ours)
        raise InputError(
            f"{shown} is not written to disk, only bitsandbytes' 4-bit formats are",
            remedy=f"{ours}; `oomproof run` makes {shown} while it loads",
        )
    if spec.checkpoint_quantization is not None:
        raise InputError(
            f"{spec.id} is already quantized ({spec.checkpoint_quantization.method})",
            remedy="quantize the 16-bit checkpoint it was made from",
        )
    if spec.num_experts:
        raise InputError(
            f"{spec.id} is a mixture of experts, and transformers keeps experts in 16 bits, as "
            "parameters that bitsandbytes does not quantize",
            remedy="quantize a dense model, or plan it for an engine with formats for experts: "
            "oomproof plan MODEL --for llama.cpp",
        )
    if spec.decoder_prefix != "model" or spec.extra_modules:
        raise InputError(
            f"{spec.id} has modules beside its language model (a vision tower), and only plain "
            "decoders are written",
            remedy="let transformers quantize it while it loads: oomproof run MODEL "
            "--engine transformers",
        )


def choose_dtype(spec: ModelSpec, asked: str) -> DType:
    """The dtype that was asked for, or "auto": the checkpoint's own where it has 16 bits.

    Raises:
        InputError: There is no such choice.
    """
    if asked == "auto":
        own = {DType.BFLOAT16, DType.FLOAT16} & {spec.dtype}
        return own.pop() if own else DType.BFLOAT16
    short = {"bf16": DType.BFLOAT16, "fp16": DType.FLOAT16, "fp32": DType.FLOAT32}
    found = short.get(asked) or next((one for one in QUANTIZE_DTYPES if one == asked), None)
    if found is None:
        raise InputError(
            f"unknown dtype {asked[:40]!r}",
            remedy=f"use one of auto, {', '.join(QUANTIZE_DTYPES)}",
        )
    return found


def quant_state(
    weight_format: Format, dtype: DType, shape: Sequence[int], offset: float | None
) -> bytes:
    """The JSON that bitsandbytes reads a weight by, as it writes it.

    With double quantization it ends in spaces, so that its length is known before the offset is.
    """
    state: dict[str, object] = {
        "quant_type": weight_format.quant_type,
        "blocksize": BLOCK_SIZE,
        "dtype": dtype.value,
        "shape": list(shape),
    }
    if not weight_format.double_quantized:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
    length = len(json.dumps(state | {"nested_offset": 0})) - 1 + _OFFSET_CHARACTERS
    return json.dumps(state | {"nested_offset": offset}).encode().ljust(length)


def _conversions(spec: ModelSpec, checkpoint: CheckpointSpec) -> list[Conversion]:
    """Each tensor of the checkpoint that belongs to the model, in the order of the bytes."""
    by_name = {tensor.name: tensor for tensor in spec.tensors}
    found = []
    for source in sorted(checkpoint.tensors, key=lambda one: (one.file, one.offset_bytes)):
        tensor = by_name.get(source.name)
        if tensor is None:
            if source.name.endswith(".rotary_emb.inv_freq"):
                continue
            if not (spec.tie_word_embeddings and source.name == _HEAD):
                raise CheckpointError(
                    source.file,
                    f"holds {source.name!r}, which config.json does not describe",
                    remedy="config and weights do not belong together; download both again",
                )
        if source.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                source.file, f"{source.name!r} holds {source.dtype}, not 16- or 32-bit floats"
            )
        quantized = tensor is not None and tensor.role is Role.LINEAR and len(tensor.shape) == 2
        found.append(Conversion(source=source, quantized=quantized))
    return found


def _groups(
    conversions: Iterable[Conversion], weight_format: Format, dtype: DType, shard_bytes: int
) -> Iterator[list[Conversion]]:
    group: list[Conversion] = []
    total = 0
    for one in conversions:
        size = sum(
            prod(entry.shape) * entry.dtype.itemsize
            for entry in _entries(one, weight_format, dtype)
        )
        if group and (group[-1].source.file != one.source.file or total + size > shard_bytes):
            yield group
            group, total = [], 0
        group.append(one)
        total += size
    if group:
        yield group


def _entries(one: Conversion, weight_format: Format, dtype: DType) -> Iterator[_Entry]:
    name, shape = one.source.name, one.source.shape
    if not one.quantized:
        yield _Entry(name=name, dtype=dtype, shape=shape)
        return
    for part in bitsandbytes_parts(name, shape, weight_format):
        length = len(quant_state(weight_format, dtype, shape, 0.0))
        yield _Entry(name=part.name, dtype=part.dtype, shape=part.shape or (length,))


def _shard(
    file: str, group: Sequence[Conversion], weight_format: Format, dtype: DType
) -> OutputShard:
    entries = [entry for one in group for entry in _entries(one, weight_format, dtype)]
    # Readers view bytes as numbers where they lie: wide types first, so that all are aligned.
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = [], 0
    for entry in entries:
        begins.append(end)
        end += prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": SAFETENSORS_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begins[-1], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(round_up(len(text), LENGTH_BYTES))
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return OutputShard(
        file=file,
        source_file=group[0].source.file,
        conversions=tuple(group),
        tensors=tuple(
            OutputTensor(
                name=entry.name,
                dtype=entry.dtype,
                shape=entry.shape,
                offset_bytes=len(raw) + begin,
            )
            for entry, begin in zip(entries, begins, strict=True)
        ),
        header=raw,
    )


def _file_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
