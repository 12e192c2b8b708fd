"""One decoder layer and its gradient, written by hand: what is computed again is what is needed.

The backward pass never multiplies with `down` again, since weights are frozen and only its input
matters to adapters; and each projection's weights become 16 bits once in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oomproof.engine.native import operators as native
from oomproof.memory.training_shape import PROJECTIONS, TrainingShape, Widths, widths_of
from oomproof.models.forward import ForwardSpec
from oomproof.models.spec import ModelSpec
from oomproof.tuning import operators
from oomproof.tuning.activations import Activations, Phase, opened
from oomproof.tuning.adapters import Adapters
from oomproof.tuning.attention import Attended, Attention, Documents
from oomproof.tuning.frozen import FrozenLayer, Scratch
from oomproof.tuning.projection import Dropout, Product

_KINDS = tuple(PROJECTIONS)
_SEED_STEP = 0x9E3779B1
MOST_GATED_RANK = 64
"""Of adapters whose products are added by the gate itself: a tile of B stays in registers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What all layers of a step have in common."""

    tokens: int
    positions: torch.Tensor
    """int32 [tokens]."""
    documents: Documents
    seed: int
    """Of dropout, from 0 to 2³¹ - 1."""
    drops: bool
    """Whether there is any: not while evaluating."""
    trains: bool
    """Whether a backward pass follows."""


class LayerPasses:
    """Computes layers forward and backward, one after the other.

    Args:
        spec: The model.
        forward: Its numbers.
        shape: Of a step.
        buffers: memory.training.static_buffers by name.
        adapters: Of all layers.
        attention: Its implementation.
        scale: Of the adapters.
        dropout: Of their inputs.
    """

    def __init__(
        self,
        spec: ModelSpec,
        forward: ForwardSpec,
        shape: TrainingShape,
        *,
        buffers: dict[str, torch.Tensor],
        adapters: Adapters,
        attention: Attention,
        scale: float,
        dropout: float,
    ) -> None:
        self._forward, self._attention = forward, attention
        self._adapters, self._scale, self._dropout = adapters, scale, dropout
        self._buffers = buffers
        device = buffers["stream"].device
        self._rms_norm = operators.rms_norm.on(device.type)
        self._accumulate = operators.accumulate.on(device.type)
        self._rms_norm_backward = operators.rms_norm_backward.on(device.type)
        self._rotate_heads = operators.rotate.on(device.type)
        self._rotate_backward = operators.rotate_backward.on(device.type)
        self._silu_mul = native.silu_mul.on(device.type)
        self._silu_mul_backward = operators.silu_mul_backward.on(device.type)
        self._silu_mul_low = operators.silu_mul_low.on(device.type)
        self._silu_mul_low_backward = operators.silu_mul_low_backward.on(device.type)
        self._widths: Widths = widths_of(spec)
        self._windows = [one.sliding_window or 0 for one in spec.attention]
        self._phases = {
            name: Phase(spec, shape, name, device)
            for name in ("forward.attention", "forward.mlp", "backward.mlp", "backward.attention")
        }
        self.kept = Activations(buffers, shape.kept, spec.num_hidden_layers)
        self._scratch = Scratch(buffers["scratch"], buffers["rounded"].dtype)
        self._lows = adapters.lows(buffers["adapters"])
        self._low_grads = adapters.lows(buffers["adapter_grads"])
        gate_up = self._lows.get("gate_up")
        # Then the gate adds adapters' part of its inputs, which are the widest that there are.
        self._gates_low = (
            gate_up is not None and len(gate_up.b) == 2 and adapters.rank <= MOST_GATED_RANK
        )
        self._low_columns: dict[str, slice] = {}
        first = 0
        for kind, low in self._lows.items():
            self._low_columns[kind] = slice(first, first + low.a.shape[0])
            first += low.a.shape[0]
        self._products: dict[tuple[str, int], Product] = {}
        self._stream, self._rounded = buffers["stream"], buffers["rounded"]
        self._tokens = -1

    def begin(self, tokens: int) -> None:
        """Says how many tokens the following forward and backward passes have."""
        self.kept.forget()
        if tokens != self._tokens:
            self._tokens = tokens
            self._products.clear()
            self._stream = self._buffers["stream"][:tokens]
            self._rounded = self._buffers["rounded"][:tokens]

    def forward(
        self,
        layer: int,
        weights: FrozenLayer,
        step: Step,
        following: torch.Tensor | None,
        norm: torch.Tensor | None,
    ) -> None:
        """Adds the layer's updates to the hidden states in `stream`; keeps what it keeps.

        Takes its normalised input in `rounded`, and leaves the next layer's there.

        Args:
            layer: Its index.
            weights: Of the layer.
            step: What all layers have in common.
            following: Where the next layer's input is kept, [tokens, hidden], or None.
            norm: Of the next layer's input; None behind the last.
        """
        self._buffers["adapters"].copy_(self._adapters.values[layer])
        stream, rounded, eps = self._stream, self._rounded, self._forward.rms_norm_eps
        with opened(self._phases["forward.attention"], step.tokens) as phase:
            attended, parts = self._attend(layer, weights, step, rounded, phase, again=False)
            self._product("o", layer, weights, step, phase).forward(attended.out, rounded)
            if step.trains:
                self.kept.keep_attended(layer, step.tokens, attended)
            # What torch allocated for them is free again.
            del attended, parts
        mid = self.kept.of("mid", layer, step.tokens) if step.trains else None
        self._accumulate(stream, rounded, mid, weights.post_norm, eps, rounded)
        with opened(self._phases["forward.mlp"], step.tokens) as phase:
            kept = self.kept.of("gate_up", layer, step.tokens) if step.trains else None
            gate_up = kept
            if gate_up is None:
                gate_up = self._rows(phase, "gate_up", step)
            product = self._product("gate_up", layer, weights, step, phase)
            product.forward(rounded, gate_up, adds_low=not self._gates_low)
            gate, up = gate_up.chunk(2, dim=1)
            gated = gate if kept is None else phase["gated"]
            if self._gates_low:
                self._silu_mul_low(gate, up, *self._low_of_gate(product), gated)
            else:
                self._silu_mul(gate, up, gated)
            self._product("down", layer, weights, step, phase).forward(gated, rounded)
        self._accumulate(stream, rounded, following, norm, eps, rounded)

    def _attend(
        self,
        layer: int,
        weights: FrozenLayer,
        step: Step,
        normed: torch.Tensor,
        phase: Phase,
        *,
        again: bool,
    ) -> tuple[Attended, tuple[torch.Tensor, ...]]:
        """(attention's result, its rotated queries, keys and values)."""
        qkv = self._qkv(layer, weights, step, normed, phase, again=again)
        is_rotated = again and self.kept.of("qkv", layer, step.tokens) is not None
        parts = self._rotate(weights, step, qkv, phase, is_rotated=is_rotated)
        window = self._window(layer, step)
        return self._attention.forward(parts, step.documents, window), parts

    def _qkv(
        self,
        layer: int,
        weights: FrozenLayer,
        step: Step,
        normed: torch.Tensor,
        phase: Phase,
        *,
        again: bool,
    ) -> torch.Tensor:
        """Products with q, k and v, [tokens, columns]."""
        qkv = self.kept.of("qkv", layer, step.tokens) if step.trains else None
        if qkv is None or not again:
            qkv = self._rows(phase, "qkv", step) if qkv is None else qkv
            self._product("qkv", layer, weights, step, phase).forward(normed, qkv, again=again)
        return qkv

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [tokens, heads, head dim]."""
        w = self._widths
        parts = qkv.unflatten(1, (-1, w.head_dim))
        query, key, value = parts.split(
            (w.heads, w.keys // w.head_dim, w.keys // w.head_dim), dim=1
        )
        return query, key, value

    def _rotate(
        self,
        weights: FrozenLayer,
        step: Step,
        qkv: torch.Tensor,
        phase: Phase,
        *,
        is_rotated: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values: in place, unless norms need what they were."""
        query, key, value = self._heads(qkv)
        rotary, eps = self._buffers["rotary"], self._forward.rms_norm_eps
        if not self._widths.normed_heads:
            if not is_rotated:
                both = qkv[:, : self._widths.queries + self._widths.keys]
                both = both.unflatten(1, (-1, self._widths.head_dim))
                self._rotate_heads(both, rotary, step.positions, None, eps, both)
            return query, key, value
        rotated = phase["rotated"].unflatten(1, (-1, self._widths.head_dim))
        new_query, new_key = rotated.split((query.shape[1], key.shape[1]), dim=1)
        self._rotate_heads(query, rotary, step.positions, weights.q_norm, eps, new_query)
        self._rotate_heads(key, rotary, step.positions, weights.k_norm, eps, new_key)
        return new_query, new_key, value

    def backward(self, layer: int, weights: FrozenLayer, step: Step, x: torch.Tensor) -> None:
        """Gradients of the layer's adapters, in their buffer, and of its input, in its output's.

        Those of output and input are in `stream`, and in `rounded` too.

        Args:
            layer: Its index. Nothing below the first is trained: its input gets no gradient.
            weights: Of the layer.
            step: As forward took it.
            x: The layer's input.
        """
        self._buffers["adapters"].copy_(self._adapters.values[layer])
        attended, parts = self.kept.take_attended(layer), None
        late = self._phases["backward.attention"]
        if attended is None:
            # Its block has what attention needs again.
            late.open(step.tokens)
            self._norm_input(weights, x, late)
            attended, parts = self._attend(layer, weights, step, late["normed"], late, again=True)
        self._mlp_backward(layer, weights, step, x, attended)
        if parts is None:
            late.open(step.tokens)
            self._norm_input(weights, x, late)
        self._attention_backward(layer, weights, step, x, attended, parts)
        late.close()

    def _norm_input(self, weights: FrozenLayer, x: torch.Tensor, phase: Phase) -> None:
        self._rms_norm(x, weights.input_norm, self._forward.rms_norm_eps, phase["normed"])

    def _mlp_backward(
        self,
        layer: int,
        weights: FrozenLayer,
        step: Step,
        x: torch.Tensor,
        attended: Attended,
    ) -> None:
        """Turns the gradient of the layer's output into that of the states before its MLP."""
        tokens, eps, grad = step.tokens, self._forward.rms_norm_eps, self._rounded
        with opened(self._phases["backward.mlp"], tokens) as phase:
            mid = self.kept.of("mid", layer, tokens)
            if mid is None:
                mid = phase["mid"]
                product = self._product("o", layer, weights, step, phase)
                product.forward(attended.out, mid, again=True)
                mid.add_(x)
            normed, gated, grad_low = phase["normed"], phase["gated"], phase["grad_low"]
            down = self._product("down", layer, weights, step, phase)
            down.grad_of_input(grad, grad_low, gated)
            self._rms_norm(mid, weights.post_norm, eps, normed)
            product = self._product("gate_up", layer, weights, step, phase)
            gate_up = self.kept.of("gate_up", layer, tokens)
            if gate_up is None:
                gate_up = phase["gate_up"]
                product.forward(normed, gate_up, again=True, adds_low=not self._gates_low)
            gate, up = gate_up.chunk(2, dim=1)
            if self._gates_low:
                self._silu_mul_low_backward(gate, up, *self._low_of_gate(product), gated)
            else:
                self._silu_mul_backward(gate, up, gated)
            down.grad_of_adapters(grad, gated, grad_low)
            grad_normed = phase["grad_normed"]
            product.backward(gate_up, normed, grad_low, grad_normed)
            self._rms_norm_backward(
                grad_normed, mid, weights.post_norm, eps, self._stream, True, grad
            )

    def _attention_backward(
        self,
        layer: int,
        weights: FrozenLayer,
        step: Step,
        x: torch.Tensor,
        attended: Attended,
        parts: tuple[torch.Tensor, ...] | None,
    ) -> None:
        """Turns the gradient of the states before the MLP into that of the layer's input."""
        tokens, phase = step.tokens, self._phases["backward.attention"]
        eps, w, grad = self._forward.rms_norm_eps, self._widths, self._rounded
        grad_low, normed = phase["grad_low"], phase["normed"]
        across = phase["grad_normed"].view(-1)
        above = across[: tokens * w.queries].view(tokens, w.queries)
        self._product("o", layer, weights, step, phase).backward(
            grad, attended.out, grad_low, above
        )
        if parts is None:
            qkv = self._qkv(layer, weights, step, normed, phase, again=True)
            is_rotated = self.kept.of("qkv", layer, tokens) is not None
            parts = self._rotate(weights, step, qkv, phase, is_rotated=is_rotated)
        else:
            kept = self.kept.of("qkv", layer, tokens)
            qkv = phase["qkv"] if kept is None else kept
        window = self._window(layer, step)
        grads = self._attention.backward(above, parts, attended, step.documents, window)
        del parts, attended
        rotary, places = self._buffers["rotary"], self._heads(qkv)
        for found, place, norm in zip(
            grads[:2], places[:2], (weights.q_norm, weights.k_norm), strict=True
        ):
            self._rotate_backward(found, place, rotary, step.positions, norm, eps, place)
        places[2].copy_(grads[2])
        del grads, found
        product = self._product("qkv", layer, weights, step, phase)
        if layer == 0:
            product.backward(qkv, normed, grad_low, None)
            return
        grad_normed = across[: tokens * w.hidden].view(tokens, w.hidden)
        product.backward(qkv, normed, grad_low, grad_normed)
        self._rms_norm_backward(grad_normed, x, weights.input_norm, eps, self._stream, True, grad)

    def _product(
        self, kind: str, layer: int, weights: FrozenLayer, step: Step, phase: Phase
    ) -> Product:
        if step.drops:
            number = layer * len(_KINDS) + _KINDS.index(kind)
            dropout = Dropout(
                probability=self._dropout,
                seed=(step.seed + (number + 1) * _SEED_STEP) & 0x7FFFFFFF,
                dropped=phase["dropped"],
            )
            return self._made(kind, layer, weights, step, dropout)
        key = kind, layer
        if key not in self._products:
            self._products[key] = self._made(kind, layer, weights, step, None)
        return self._products[key]

    def _made(
        self, kind: str, layer: int, weights: FrozenLayer, step: Step, dropout: Dropout | None
    ) -> Product:
        return Product(
            weight=weights.projections[kind],
            low=self._lows.get(kind),
            low_grads=self._low_grads.get(kind),
            scratch=self._scratch,
            scale=self._scale,
            multiplier=self._forward.residual_multiplier if kind in {"o", "down"} else 1.0,
            low_rows=self._low_rows(kind, layer, step.tokens),
            dropout=dropout,
        )

    def _window(self, layer: int, step: Step) -> int:
        """Tokens that one looks back at; 0 where that is all of them."""
        window = self._windows[layer]
        return window if window < step.documents.length else 0

    def _low_of_gate(
        self, product: Product
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """What silu_mul_low takes of the adapters."""
        low_rows = product.low_rows
        assert low_rows is not None
        (_, _, gate_b), (_, _, up_b) = self._lows["gate_up"].b
        return low_rows, gate_b, up_b, self._scale

    def _low_rows(self, kind: str, layer: int, tokens: int) -> torch.Tensor | None:
        columns = self._low_columns.get(kind)
        if columns is None:
            return None
        return self._buffers["low"][layer, :tokens, columns]

    def _rows(self, phase: Phase, name: str, step: Step) -> torch.Tensor:
        """A buffer of a phase; an own one where all layers keep it and none is kept now."""
        if name in phase:
            return phase[name]
        columns = self._widths.qkv if name == "qkv" else 2 * self._widths.mlp
        return self._rounded.new_empty(step.tokens, columns)
