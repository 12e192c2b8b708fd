"""Bytes of the keys and values that a layer keeps."""

from __future__ import annotations

from oomproof.formats import DType
from oomproof.models.spec import AttentionSpec
from oomproof.units import round_up

PAGE_TOKENS = 256
"""Tokens of one KV page; contexts are rounded up to it."""

KV_FORMATS = {
    "bf16": DType.BFLOAT16,
    "fp16": DType.FLOAT16,
    "fp8": DType.FLOAT8_E4M3FN,
    "fp32": DType.FLOAT32,
}


def planned_tokens(context: int) -> int:
    """Tokens that are reserved for a request of `context` tokens."""
    return round_up(context, PAGE_TOKENS)


def layer_kv_bytes(
    attention: AttentionSpec,
    *,
    context: int,
    concurrency: int,
    dtype: DType,
    overhead_bytes: int = 0,
) -> int:
    """Bytes of one layer's keys and values for `concurrency` requests of `context` tokens.

    Keys are [kv heads, tokens, head dim], values likewise; a sliding-window layer keeps no more
    tokens than its window. `overhead_bytes` is what the engine keeps besides, for each request.
    """
    tokens = planned_tokens(context)
    if attention.sliding_window is not None:
        tokens = min(tokens, attention.sliding_window)
    per_token = attention.num_key_value_heads * (attention.key_head_dim + attention.value_head_dim)
    return concurrency * (per_token * tokens * dtype.itemsize + overhead_bytes)
