"""What training a LoRA adapter on transformers and peft takes of a device, beside its weights.

What their modules save for the backward pass, and what passes through at its highest point; of
moments that are never at once the highest counts. Bounds where kernels differ, beside operators of
twelve architectures within a sixth (tests/memory/test_peft.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oomproof.errors import InputError
from oomproof.formats import ceil_div
from oomproof.memory.training_shape import Kept
from oomproof.models.spec import AttentionSpec, ModelSpec, Role, TensorSpec

FLOAT32 = 4
LOSS_POSITIONS = 1024
"""Whose logits exist at once."""
_BLOCK_8BIT = 256
_LEAST_8BIT = 4096
"""bitsandbytes keeps the states of smaller tensors in 32 bits."""
_LEAST_PAGED = 100_000
"""Of smaller tensors bitsandbytes' paged optimizers keep the states on the device."""
_PLACES = 32
"""Of a token: its number, place and label."""
_ROUTING = 64
"""Of a token's choice of an expert: weights and places."""
SCALED_LOGITS = (
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "output_multiplier_scale",
)
"""Fields of a config that change logits behind the head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What is trained, and how."""

    rank: int
    target_modules: tuple[str, ...]
    """Names of linears, or ("all-linear",)."""
    optimizer: str
    """"adamw", "adamw-8bit", "paged-adamw" or "paged-adamw-8bit"."""
    checkpointing: str
    """"none", "layers", "offload", or of our own engine "auto"."""
    compute_bytes: int
    """Of an element that is computed: 2 for bfloat16, 4 for float32."""
    packed: bool
    """Whether several documents share a sequence, so that attention has a mask."""
    documents: int = 0
    """In a sequence, at most; 0 for as many as of 64 tokens each."""
    dropout: bool = False
    """Of the adapters' inputs."""
    kept: Kept | None = None
    """What layers of our own engine keep, where `checkpointing` leaves it to the memory."""


def target_linears(spec: ModelSpec, target_modules: Sequence[str]) -> tuple[TensorSpec, ...]:
    """The weights that get an adapter."""
    everything = tuple(target_modules) == ("all-linear",)
    return tuple(
        tensor
        for tensor in spec.tensors
        if tensor.role is Role.LINEAR
        and len(tensor.shape) == 2
        and (everything or tensor.name.removesuffix(".weight").rpartition(".")[2] in target_modules)
    )


def check_targets(spec: ModelSpec, target_modules: Sequence[str]) -> None:
    """Refuses names that no linear of a decoder layer has: peft would look for them elsewhere.

    Raises:
        InputError: It names the first of them.
    """
    linears = target_linears(spec, ("all-linear",))
    known = dict.fromkeys(one.name.removesuffix(".weight").rpartition(".")[2] for one in linears)
    unknown = [one for one in target_modules if one not in known and one != "all-linear"]
    if unknown:
        raise InputError(
            f"target module {unknown[0]!r} is no linear layer of the decoder",
            remedy=f"use some of {', '.join(known)}",
        )


def adapter_tensors(spec: ModelSpec, tuned: Tuned) -> tuple[int, ...]:
    """Elements of each matrix of the adapter: A is [rank, in], B is [out, rank]."""
    return tuple(
        tuned.rank * side
        for tensor in target_linears(spec, tuned.target_modules)
        for side in reversed(tensor.shape)
    )


def optimizer_bytes(elements: Sequence[int], optimizer: str) -> int:
    """Both moments of AdamW."""
    if "8bit" not in optimizer:
        return 2 * FLOAT32 * sum(elements)
    return sum(
        2 * FLOAT32 * count
        if count < _LEAST_8BIT
        else 2 * (count + FLOAT32 * ceil_div(count, _BLOCK_8BIT))
        for count in elements
    )


def split_optimizer_bytes(elements: Sequence[int], optimizer: str) -> tuple[int, int]:
    """Bytes of both moments on the device, and in the managed memory of paged optimizers.

    bitsandbytes pages the states of large matrices, not the scales of their 8-bit blocks.
    """
    everything = optimizer_bytes(elements, optimizer)
    if not optimizer.startswith("paged"):
        return everything, 0
    size = 1 if "8bit" in optimizer else FLOAT32
    paged = 2 * size * sum(count for count in elements if count >= _LEAST_PAGED)
    return everything - paged, paged


def chunks_loss(spec: ModelSpec) -> bool:
    """Whether logits are made in chunks: what the model does behind its head is known."""
    return not any(spec.config.get(name) for name in SCALED_LOGITS)


def training_terms(
    spec: ModelSpec, tuned: Tuned, *, micro_batch: int, length: int
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Bytes of a device, and of the host, for one micro-batch.

    Args:
        spec: The model.
        tuned: What is trained, and how.
        micro_batch: Sequences at once.
        length: Tokens of each.

    Returns:
        adapters, gradients, optimizer, activations, logits and dequantization of the device;
        offloaded and optimizer of the host. Activations are the most that layers take, logits what
        the loss takes more than that, at the end of the forward pass.
    """
    elements = adapter_tensors(spec, tuned)
    moments, paged_moments = split_optimizer_bytes(elements, tuned.optimizer)
    tokens = micro_batch * length
    stream = tokens * spec.hidden_size
    inputs = spec.num_hidden_layers * stream * tuned.compute_bytes
    layers = _layers(spec, tuned, micro_batch, length)
    if tuned.checkpointing == "none":
        kept = sum(layer.saved * count for layer, count in layers.items())
        most = max(layer.passing for layer in layers)
    else:
        # Inputs that are on the host come back one at a time.
        kept = inputs if tuned.checkpointing == "layers" else 2 * stream * tuned.compute_bytes
        most = max(layer.saved + layer.passing for layer in layers)
    kept += tokens * _PLACES
    backward = kept + most
    # The last norm's, and its result, cut and gathered.
    states = stream * (2 * FLOAT32 * _norm_copies(spec) + 4 * tuned.compute_bytes)
    loss = kept + states + _loss_bytes(spec, tokens)
    weight = tuned.compute_bytes * max(
        (one.numel for one in spec.tensors if one.role is Role.LINEAR), default=0
    )
    device = {
        "adapters": FLOAT32 * sum(elements),
        "gradients": FLOAT32 * sum(elements),
        "optimizer": moments,
        "activations": backward,
        "logits": max(0, loss - backward - weight),
        "dequantization": weight,
    }
    host = {
        "offloaded": inputs if tuned.checkpointing == "offload" else 0,
        "optimizer": paged_moments,
    }
    return device, host


def logits_bytes(spec: ModelSpec, tokens: int) -> int:
    """Of the logits that exist at once, in float32."""
    positions = min(tokens, LOSS_POSITIONS) if chunks_loss(spec) else tokens
    return FLOAT32 * spec.vocab_size * positions


def _loss_bytes(spec: ModelSpec, tokens: int) -> int:
    """Logarithms of logits, two gradients, and what a soft cap keeps."""
    kinds = 4 if spec.config.get("final_logit_softcapping") else 3
    return kinds * logits_bytes(spec, tokens)


def _norm_copies(spec: ModelSpec) -> int:
    """Of its input in float32, that a norm saves; one that has a mean saves the difference too."""
    return 2 if spec.architecture.startswith("Cohere") else 1


def _layers(spec: ModelSpec, tuned: Tuned, micro_batch: int, length: int) -> Mapping[_Layer, int]:
    """Each kind of layer, and how many there are of it."""
    tensors: dict[int, list[TensorSpec]] = {}
    for one in spec.tensors:
        if one.layer is not None:
            tensors.setdefault(one.layer, []).append(one)
    targets = {one.name for one in target_linears(spec, tuned.target_modules)}
    kinds: dict[object, _Layer] = {}
    counts: dict[_Layer, int] = {}
    for layer, attention in enumerate(spec.attention):
        own = tensors.get(layer, [])
        kind = (attention, *((*one.name.split(".")[-2:], one.shape) for one in own))
        found = kinds.get(kind)
        if found is None:
            linears = [one for one in own if one.name in targets]
            found = _Layer(spec, tuned, attention, own, linears, micro_batch, length)
            kinds[kind] = found
        counts[found] = counts.get(found, 0) + 1
    return counts


class _Layer:
    """What one layer saves for its backward pass, and what passes through it there at once."""

    def __init__(
        self,
        spec: ModelSpec,
        tuned: Tuned,
        attention: AttentionSpec,
        tensors: Sequence[TensorSpec],
        linears: Sequence[TensorSpec],
        micro_batch: int,
        length: int,
    ) -> None:
        self._spec, self._tuned, self._element = spec, tuned, tuned.compute_bytes
        self._attention, self._tensors, self._linears = attention, tensors, linears
        self._experts = [one for one in self._tensors if ".experts." in one.name]
        # Experts with biases clamp what they compute besides (gpt-oss).
        self._clamped = any(one.role is Role.BIAS for one in self._experts)
        tokens, scores = micro_batch * length, micro_batch * length * length
        self.saved = tokens * (self._norms() + self._adapters() + self._heads() + self._mlp())
        self.passing = tokens * max(self._through_adapters(), self._through_experts())
        if spec.eager_attention:
            heads = scores * spec.num_attention_heads
            # Softmax's result, in float32 and as it is multiplied; a soft cap's; their gradients.
            sinks = any(one.name.endswith("sinks") for one in self._tensors)
            self.saved += heads * (self._element if sinks else FLOAT32 + 2 * self._element)
            # The MLP's are gone by then.
            scores_pass = heads * (FLOAT32 + self._element) - tokens * self._mlp()
            self.passing = max(self.passing, scores_pass)
        if self._masked or spec.eager_attention:
            # A mask of every token against every token, and what the kernel makes of it.
            self.saved += scores * (1 + self._element)

    @property
    def _masked(self) -> bool:
        several = self._tuned.packed and self._tuned.documents != 1
        return several or self._attention.sliding_window is not None

    def _norms(self) -> int:
        """Their inputs in float32, of a token, and a sum of each."""
        attention, heads = self._attention, self._spec.num_attention_heads
        names = {one.name for one in self._tensors}
        total = 0
        for one in self._tensors:
            if one.role is not Role.NORM or not one.name.endswith("weight"):
                continue
            if one.name.removesuffix("weight") + "bias" in names:  # torch's own, in one kernel
                total += self._element * one.shape[-1] + 2 * FLOAT32
                continue
            of_heads = {
                "q_norm": heads * attention.query_head_dim,
                "k_norm": attention.num_key_value_heads * attention.key_head_dim,
            }.get(one.name.split(".")[-2], 0)
            total += FLOAT32 * (max(one.shape[-1], of_heads) + (heads if of_heads else 1))
        return total * _norm_copies(self._spec)

    def _adapters(self) -> int:
        """peft casts the input to float32 for each adapter; with dropout it has a mask of each."""
        each = FLOAT32
        if self._tuned.dropout:  # on processors, where float32 is computed, the mask is in float32
            each += 1 if self._element < FLOAT32 else FLOAT32
        return sum(each * one.shape[1] + FLOAT32 * self._tuned.rank for one in self._linears)

    def _heads(self) -> int:
        """Queries, keys, values and outputs; each head has keys of its own where it must."""
        attention, heads = self._attention, self._spec.num_attention_heads
        expanded = self._masked or self._spec.eager_attention or attention.is_latent
        stored = heads if expanded else attention.num_key_value_heads
        sides = attention.query_head_dim + attention.output_head_dim
        return (heads + stored) * sides * self._element + heads * FLOAT32

    def _mlp(self) -> int:
        """Gate and up, and the gate's activation; of experts for each that a token passes."""
        spec, element = self._spec, self._element
        if self._experts:
            kinds = 6 if self._clamped else 3
            rows = spec.num_experts_per_token * (element * spec.hidden_size + _ROUTING)
            return element * kinds * spec.intermediate_size + rows
        linears = [
            one.shape
            for one in self._tensors
            if one.role is Role.LINEAR and ".self_attn." not in one.name
        ]
        into = sum(shape[0] for shape in linears if shape[1:] == (spec.hidden_size,))
        # The widest layer's where it cannot be told; others may be narrower (DeepSeek's first).
        out = [shape[1] for shape in linears if shape[0] == spec.hidden_size]
        width = min(max(out, default=spec.intermediate_size), spec.intermediate_size)
        return element * (3 if into >= 2 * width else 1) * width

    def _through_adapters(self) -> int:
        """The gradient of an adapter's widest side, beside those of the residual stream."""
        spec = self._spec
        wide = max((side for one in self._linears for side in one.shape), default=0)
        total = FLOAT32 * (wide + self._tuned.rank + 4 * spec.hidden_size)
        if self._tuned.dropout:
            total += FLOAT32 * max((one.shape[1] for one in self._linears), default=0)
        if wide >= 2 * spec.intermediate_size:  # gate and up in one: as they are computed, too
            total += self._element * wide
        return total

    def _through_experts(self) -> int:
        if not self._experts:
            return 0
        spec = self._spec
        rows = (2 + 2 * self._clamped) * spec.intermediate_size
        rows += spec.num_experts_per_token * spec.hidden_size
        return self._element * rows + 3 * FLOAT32 * spec.hidden_size
