"""What the native engine allocates: every buffer by name and shape, for planning and for loading.

The engine carves exactly these from one arena a device, so the plan's workspace is a sum of shapes
and not an estimate. T is the most tokens of one call (a prefill chunk, or a decode step of every
request), B the requests at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from oomproof.formats import DType, ceil_div
from oomproof.memory.adapter import lora_scratch_bytes
from oomproof.memory.arena import ALIGNMENT_BYTES, Buffer, Layout, lay_out
from oomproof.memory.kv_cache import PAGE_TOKENS, planned_tokens
from oomproof.memory.sampler import sampler_buffers
from oomproof.memory.slices import SLICE_BYTES, SLICE_ROWS, up_rows
from oomproof.models.spec import AttentionSpec, ModelSpec
from oomproof.units import MIB, round_up

CHUNK_TOKENS = 2048
"""A prompt is processed this many tokens at a time; quantized weights are dequantized for each."""
_LEAST_SCRATCH_BYTES = 32 * MIB
_STEP_PROMPT = 64
"""Tokens of a prompt that are multiplied as a decode step's are."""
SQUARES_COLUMNS = 64
"""Of the hidden states, whose squares are one sum: what decode steps normalise them by."""
PRODUCT_COUNTERS = 256
"""int32 numbers by which blocks of a decode step's product know each other; 0 between two."""
_PROMPT_SIZES = (_STEP_PROMPT, 512)
_STEP_PIECE_TOKENS, _PIECE_TOKENS = 220, 365
"""Tokens that such a piece takes as long as, and by which a longer one is slower than its own: 5,
20 and 55 ms for 64, 512 and 2,048 tokens of an 8B in 4 bits on an H200."""
PINNED_BYTES = 256 * MIB
"""Page-locked host memory that a checkpoint's bytes pass through."""
DEVICE_STAGING_BYTES = 192 * MIB
"""What slices wait in on a device until they are quantized into their place, TILING_BYTES too."""
TILING_BYTES = 16 * MIB
"""What lies between a slice of a 4-bit weight and its tiles: row-major codes and scales."""
DECODE_SPLITS = 16
"""Parts that a decode step's attention to one request is split into at most, side by side."""
SPLIT_TOKENS = 512
"""Fewest tokens of a part."""
ATTENTION_BLOCKS = 512
"""Blocks of threads side by side that a decode step's attention is launched with at most."""
_BLOCKS_TOGETHER = 8
"""Of one request and KV head, that meet without passing through memory."""
STREAMING_BUFFERS = 2
"""Layers in flight where layers are streamed from host memory: one computes, the next travels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A rank's part of every layer, where ranks share heads and the width of the MLP.

    That is tensor parallelism (arXiv:1909.08053).
    """

    rank: int = 0
    ranks: int = 1

    def of(self, size: int, what: str) -> int:
        """What a rank has of something that is split.

        Raises:
            ValueError: It cannot be split evenly.
        """
        if size % self.ranks:
            raise ValueError(f"{size} {what} cannot be split evenly over {self.ranks} ranks")
        return size // self.ranks


WHOLE = Share()
"""All of every layer: what the engine runs today."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """What the buffers of a device depend on, besides the model."""

    context: int
    """Tokens of one request."""
    concurrency: int
    compute_dtype: DType
    quantized: bool
    """Whether weights are dequantized slice by slice."""
    has_layers: bool = True
    has_head: bool
    """Whether logits are computed and tokens drawn there."""
    share: Share = WHOLE


def chunk_tokens(context: int) -> int:
    """Tokens of a prompt that are processed at once."""
    return min(planned_tokens(context), CHUNK_TOKENS)


def step_tokens(shape: StepShape) -> int:
    """T: the most tokens of one call."""
    return max(chunk_tokens(shape.context), shape.concurrency)


def layer_pages(attention: AttentionSpec, context: int) -> int:
    """KV pages that one request has in a layer.

    A layer with a sliding window keeps its window and the chunk that is being written, in a ring.
    """
    pages = ceil_div(context, PAGE_TOKENS)
    if attention.sliding_window is None:
        return pages
    kept = attention.sliding_window + chunk_tokens(context)
    return min(pages, ceil_div(kept, PAGE_TOKENS) + 1)


def layer_kv_bytes(
    attention: AttentionSpec, *, context: int, concurrency: int, dtype: DType, share: Share = WHOLE
) -> int:
    """Bytes of one layer's pages for `concurrency` requests of `context` tokens."""
    kv_heads = share.of(attention.num_key_value_heads, "KV heads")
    per_token = kv_heads * (attention.key_head_dim + attention.value_head_dim)
    tokens = layer_pages(attention, context) * PAGE_TOKENS
    return concurrency * tokens * per_token * dtype.itemsize


def prompt_sizes(longest: int) -> tuple[int, ...]:
    """Tokens of the pieces of a prompt that are recorded, up to the longest chunk."""
    return tuple(sorted({min(size, longest) for size in (*_PROMPT_SIZES, longest)}))


def next_piece(tokens: int, sizes: Sequence[int]) -> int:
    """The recorded size that comes next for a prompt with so many tokens left.

    Each piece dequantizes every weight, which takes as long as some of its tokens do, and padding
    takes as long as tokens: the sizes that follow are chosen with it.

    Args:
        tokens: At least one.
        sizes: Ascending.
    """
    return _pieces(tokens, tuple(sizes))[1]


@cache
def _pieces(tokens: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(Tokens that all pieces are as slow as, the first piece) of what is left."""
    largest = sizes[-1]
    if tokens > largest * 2:
        return 0, largest
    padded = next((size for size in sizes if size >= tokens), None)
    choices = [
        (_time_of(size) + _pieces(tokens - size, sizes)[0], size) for size in sizes if size < tokens
    ]
    if padded is not None:
        choices.append((_time_of(padded), padded))
    return min(choices)


def _time_of(size: int) -> int:
    return _STEP_PIECE_TOKENS if size <= _STEP_PROMPT else _PIECE_TOKENS + size


def graph_sizes(concurrency: int) -> tuple[int, ...]:
    """Rows of the decode steps that are recorded: powers of two, and every request at once."""
    powers = (1 << n for n in range(concurrency.bit_length()))
    return tuple(sorted({*(size for size in powers if size <= concurrency), concurrency}))


def decode_splits(context: int) -> int:
    """Parts that attention to one request is split into."""
    return max(1, min(DECODE_SPLITS, ceil_div(context, SPLIT_TOKENS)))


def attention_partials(kv_heads: int, group: int, head_dim: int, requests: int) -> int:
    """float32 numbers that a decode step's attention leaves for its last block, on any GPU.

    For each block of threads: the weighted values of a KV head's query heads, and for every four of
    them the largest score and the sum.
    """
    blocks = max(ATTENTION_BLOCKS, kv_heads * requests) + kv_heads * requests
    return blocks * group * head_dim // 4 * 6


def attention_counters(kv_heads: int, requests: int) -> int:
    """int32 numbers by which its blocks know the last of them; 0 between two launches."""
    return requests * kv_heads * _BLOCKS_TOGETHER


def step_buffers(spec: ModelSpec, shape: StepShape) -> tuple[Buffer, ...]:
    """Every buffer of a device, weights and KV pool aside."""
    tokens, requests = step_tokens(shape), shape.concurrency
    hidden, compute = spec.hidden_size, shape.compute_dtype
    attention = spec.attention[0]
    share, head_dim = shape.share, attention.key_head_dim
    heads = share.of(spec.num_attention_heads, "attention heads")
    qkv = (heads + 2 * share.of(attention.num_key_value_heads, "KV heads")) * head_dim
    width = share.of(spec.intermediate_size, "columns of the MLP")
    groups = sorted({layer.sliding_window or 0 for layer in spec.attention})
    buffers = [
        # Row by row: token, position, slot of its request (-1 for padding).
        Buffer(name="inputs", shape=(3, tokens), dtype=DType.INT32),
        Buffer(name="hidden", shape=(tokens, hidden), dtype=compute),
        Buffer(name="normed", shape=(tokens, hidden), dtype=compute),
        Buffer(name="scratch", shape=(scratch_bytes(spec, shape),), dtype=DType.UINT8),
    ]
    if shape.has_layers:
        splits = decode_splits(shape.context)
        kv_heads = share.of(attention.num_key_value_heads, "KV heads")
        partials = attention_partials(kv_heads, heads // kv_heads, head_dim, requests)
        buffers += [
            # The hidden states of a decode step are updated from one into the other.
            Buffer(name="hidden_next", shape=(requests, hidden), dtype=compute),
            Buffer(
                name="squares",
                shape=(_STEP_PROMPT, ceil_div(hidden, SQUARES_COLUMNS)),
                dtype=DType.FLOAT32,
            ),
            Buffer(name="product_counters", shape=(PRODUCT_COUNTERS,), dtype=DType.INT32),
            Buffer(
                name="counters", shape=(attention_counters(kv_heads, requests),), dtype=DType.INT32
            ),
            *(
                Buffer(
                    name=f"pages.{window}",
                    shape=(requests, _group_pages(spec, window, shape.context)),
                    dtype=DType.INT32,
                )
                for window in groups
            ),
            # Cosines and sines of every position, of the first half of a head: the second repeats.
            Buffer(
                name="rotary",
                shape=(2, planned_tokens(shape.context), head_dim // 2),
                dtype=DType.FLOAT32,
            ),
            Buffer(name="qkv", shape=(tokens, qkv), dtype=compute, phase="attention"),
            Buffer(
                name="attended", shape=(tokens, heads * head_dim), dtype=compute, phase="attention"
            ),
            # Weighted values of each part, its largest score and its sum.
            Buffer(
                name="partials",
                shape=(requests, heads, splits, head_dim + 2),
                dtype=DType.FLOAT32,
                phase="attention",
            ),
            Buffer(name="step_partials", shape=(partials,), dtype=DType.FLOAT32, phase="attention"),
            Buffer(name="gated", shape=(tokens, width), dtype=compute, phase="mlp"),
        ]
        if spec.adapter is not None:
            size = lora_scratch_bytes(spec, tokens=tokens, dtype=compute)
            buffers.append(Buffer(name="lora", shape=(size,), dtype=DType.UINT8))
    if shape.has_head:
        buffers += [
            Buffer(name="last_hidden", shape=(requests, hidden), dtype=compute),
            Buffer(name="head_out", shape=(requests, spec.vocab_size), dtype=compute, phase="head"),
            Buffer(name="logits", shape=(requests, spec.vocab_size), dtype=DType.FLOAT32),
            Buffer(name="drawn", shape=(requests,), dtype=DType.INT64),
            *(
                Buffer(name=f"sampler.{name}", shape=size, dtype=dtype)
                for name, size, dtype in sampler_buffers(requests, spec.vocab_size)
            ),
        ]
    return tuple(buffers)


def up_bytes(*, tokens: int, hidden: int, width: int, itemsize: int) -> int:
    """The end of scratch where the MLP's up projection waits for its gate, slice after slice.

    Args:
        tokens: T.
        hidden: Columns of the projection.
        width: Its rows.
        itemsize: Of the compute dtype.
    """
    return round_up(tokens * up_rows(hidden, width) * itemsize, ALIGNMENT_BYTES)


def scratch_bytes(spec: ModelSpec, shape: StepShape) -> int:
    """What products write to besides their result."""
    compute, waiting = shape.compute_dtype, 0
    if shape.has_layers:
        waiting = up_bytes(
            tokens=step_tokens(shape),
            hidden=spec.hidden_size,
            width=shape.share.of(spec.intermediate_size, "columns of the MLP"),
            itemsize=compute.itemsize,
        )
    if not shape.quantized:
        return waiting
    queries = spec.num_attention_heads * spec.attention[0].key_head_dim
    columns = max(spec.hidden_size, spec.intermediate_size, queries)
    widest = SLICE_ROWS * columns * compute.itemsize
    return max(_LEAST_SCRATCH_BYTES, widest, waiting + SLICE_BYTES)


def step_layout(spec: ModelSpec, shape: StepShape) -> Layout:
    """Where the buffers of a device lie in its arena."""
    return lay_out(step_buffers(spec, shape))


def _group_pages(spec: ModelSpec, window: int, context: int) -> int:
    layer = next(layer for layer in spec.attention if (layer.sliding_window or 0) == window)
    return layer_pages(layer, context)
