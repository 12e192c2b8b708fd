"""Bytes of everything that lives only while tokens are computed.

One layer runs at a time, so the workspace of a device is that of its hungriest moment: attention
or the MLP of one layer over a prefill chunk, or the logits of one token. Shapes are those of
transformers' modelling code; each product below is one tensor that is alive at that moment.
"""

from __future__ import annotations

from dataclasses import dataclass

from oomproof.formats import DType
from oomproof.memory.adapter import lora_activation_bytes
from oomproof.memory.kv_cache import planned_tokens
from oomproof.memory.profiles import EngineProfile
from oomproof.models.spec import ModelSpec

_FLOAT32_BYTES = 4
_INT64_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkspaceShape:
    """What the size of a device's workspace depends on."""

    context: int
    """Tokens of one request."""
    compute_dtype: DType
    largest_linear: int
    """Elements of the largest quantized weight there, 0 where none is quantized."""
    splits_outliers: bool = False
    """Whether columns of outliers are computed in 16 bits, as LLM.int8() does."""
    has_head: bool
    """Whether logits are computed there."""


def chunk_tokens(context: int, profile: EngineProfile) -> int:
    """Tokens of a prompt that are processed at once."""
    return min(planned_tokens(context), profile.prefill_chunk_tokens)


def residual_bytes(spec: ModelSpec, tokens: int, itemsize: int) -> int:
    """Hidden states, their normalised copy, and the float32 copies inside RMSNorm."""
    return tokens * spec.hidden_size * (3 * itemsize + 2 * _FLOAT32_BYTES)


def attention_bytes(
    spec: ModelSpec, *, tokens: int, context: int, itemsize: int, expands_kv_heads: bool
) -> int:
    """Queries, keys, values before and after rotation, the mask, and expanded keys and values."""
    widest = 0
    for layer in set(spec.attention):
        queries = spec.num_attention_heads * layer.query_head_dim
        keys_values = layer.num_key_value_heads * (layer.key_head_dim + layer.value_head_dim)
        projected = tokens * (3 * queries + 2 * keys_values) * itemsize
        output = 2 * tokens * spec.num_attention_heads * layer.output_head_dim * itemsize
        expanded = 0
        if expands_kv_heads and layer.num_key_value_heads < spec.num_attention_heads:
            head_dims = layer.query_head_dim + layer.output_head_dim
            if layer.is_latent:
                # What expands the latent is a copy of its own beside the keys made from it.
                head_dims += layer.query_head_dim
            expanded = context * spec.num_attention_heads * head_dims * itemsize
        widest = max(widest, projected + output + expanded)
    widest += mask_bytes(tokens=tokens, context=context, itemsize=itemsize)
    if spec.eager_attention:
        widest += score_bytes(spec, tokens=tokens, context=context, itemsize=itemsize)
    return widest


def score_bytes(spec: ModelSpec, *, tokens: int, context: int, itemsize: int) -> int:
    """The [heads, tokens, context] scores of unfused attention: thrice, and once in float32."""
    return spec.num_attention_heads * tokens * context * (3 * itemsize + _FLOAT32_BYTES)


def mask_bytes(*, tokens: int, context: int, itemsize: int) -> int:
    """The [tokens, context] mask: booleans, while they are combined, and as an additive bias."""
    booleans = 3
    return tokens * context * (booleans + itemsize)


def mlp_bytes(spec: ModelSpec, *, tokens: int, itemsize: int) -> int:
    """Gate, up, the activated gate and their product."""
    return 4 * tokens * spec.intermediate_size * itemsize


def logits_bytes(spec: ModelSpec, itemsize: int) -> int:
    """Logits of one token, their float32 copy, and what sampling sorts."""
    sampling = 4 * _FLOAT32_BYTES + 2 * _INT64_BYTES
    return spec.vocab_size * (itemsize + _FLOAT32_BYTES + sampling)


def dequantization_bytes(shape: WorkspaceShape, profile: EngineProfile) -> int:
    """The 16-bit copy of the largest weight, and its absmax in float32 (twice, while un-nested).

    LLM.int8() copies the columns that meet an outlier: how many depends on the prompt, all of them
    at worst, as 8-bit codes and twice as float32 before they are 16-bit (bitsandbytes 0.50,
    backends/default/ops.py and _ops.py).
    """
    if shape.splits_outliers:
        return shape.largest_linear * (1 + 2 * _FLOAT32_BYTES)
    if not profile.dequantizes_to_scratch:
        return 0
    copy_bytes = shape.largest_linear * shape.compute_dtype.itemsize
    return copy_bytes + 2 * (shape.largest_linear // 64) * _FLOAT32_BYTES


def repacking_bytes(shape: WorkspaceShape, profile: EngineProfile) -> int:
    """Rewriting a 4-bit weight for the CPU: codes as int32, and three copies of them as uint8."""
    return 7 * shape.largest_linear if profile.repacks_4bit else 0


def workspace_bytes(spec: ModelSpec, shape: WorkspaceShape, profile: EngineProfile) -> int:
    """The largest moment of a device, with what its libraries keep."""
    itemsize = shape.compute_dtype.itemsize
    context = planned_tokens(shape.context)
    tokens = chunk_tokens(shape.context, profile)
    scratch = dequantization_bytes(shape, profile)
    attention = attention_bytes(
        spec,
        tokens=tokens,
        context=context,
        itemsize=itemsize,
        expands_kv_heads=profile.expands_kv_heads,
    )
    mlp = mlp_bytes(spec, tokens=tokens, itemsize=itemsize)
    layer = residual_bytes(spec, tokens, itemsize) + scratch + max(attention, mlp)
    layer += lora_activation_bytes(spec, tokens=tokens, itemsize=itemsize)
    head = logits_bytes(spec, itemsize) if shape.has_head else 0
    largest = max(layer, head, repacking_bytes(shape, profile))
    return profile.library_workspace_bytes + largest + fragmentation_bytes(scratch, profile)


def fragmentation_bytes(scratch: int, profile: EngineProfile) -> int:
    """What the allocator reserves and cannot hand out; it grows with the largest tensor.

    Half of the dequantized copy is what was measured: a free block that held a smaller tensor is
    too short for it (a 2-layer 405B: 1.0 GiB of fragmentation with a copy of 1.6).
    """
    return profile.fragmentation_bytes + scratch // 2
