"""One decoder layer and its gradient, written by hand: what is computed again is what is needed.

The backward pass never multiplies with `down` again, since weights are frozen and only its input
matters to adapters; and each projection's weights become 16 bits once in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oomproof.engine.native.operators import silu_mul
from oomproof.memory.training_shape import PROJECTIONS, TrainingShape, Widths, widths_of
from oomproof.models.forward import ForwardSpec
from oomproof.models.spec import ModelSpec
from oomproof.tuning.activations import Activations, Phase, opened
from oomproof.tuning.adapters import Adapters
from oomproof.tuning.attention import Attended, Attention, Documents
from oomproof.tuning.frozen import FrozenLayer, Scratch
from oomproof.tuning.operators import (
    rms_norm,
    rms_norm_backward,
    rotate,
    rotate_backward,
    silu_mul_backward,
    silu_mul_low,
    silu_mul_low_backward,
)
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
        self._device = buffers["grad"].device
        self._widths: Widths = widths_of(spec)
        self._windows = [one.sliding_window or 0 for one in spec.attention]
        self._phases = {
            name: Phase(spec, shape, name)
            for name in ("forward.attention", "forward.mlp", "backward.mlp", "backward.attention")
        }
        self.kept = Activations(buffers, shape.kept, spec.num_hidden_layers)
        self._scratch = Scratch(buffers["scratch"], buffers["grad"].dtype)
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

    def forward(
        self, layer: int, weights: FrozenLayer, step: Step, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        """The layer's output [tokens, hidden] from its input; keeps what it keeps."""
        self._buffers["adapters"].copy_(self._adapters.values[layer])
        mid = self.kept.of("mid", layer, step.tokens) if step.trains else None
        mid = out if mid is None else mid
        with opened(self._phases["forward.attention"], self._device) as phase:
            attended, parts = self._attend(layer, weights, step, x, phase, again=False)
            self._product("o", layer, weights, step, phase).forward(attended.out, mid, x)
            if step.trains:
                self.kept.keep_attended(layer, step.tokens, attended)
            # Views of the phase's buffers would keep them.
            del attended, parts
        with opened(self._phases["forward.mlp"], self._device) as phase:
            normed, eps = phase["normed"][: step.tokens], self._forward.rms_norm_eps
            rms_norm(mid, weights.post_norm, eps, normed)
            kept = self.kept.of("gate_up", layer, step.tokens) if step.trains else None
            gate_up = kept
            if gate_up is None:
                gate_up = self._rows(phase, "gate_up", step)
            product = self._product("gate_up", layer, weights, step, phase)
            product.forward(normed, gate_up, adds_low=not self._gates_low)
            gate, up = gate_up.chunk(2, dim=1)
            gated = gate if kept is None else phase["gated"][: step.tokens]
            if self._gates_low:
                silu_mul_low(gate, up, *self._low_of_gate(layer, step), gated)
            else:
                silu_mul(gate, up, gated)
            self._product("down", layer, weights, step, phase).forward(gated, out, mid)

    def _attend(
        self,
        layer: int,
        weights: FrozenLayer,
        step: Step,
        x: torch.Tensor,
        phase: Phase,
        *,
        again: bool,
    ) -> tuple[Attended, tuple[torch.Tensor, ...]]:
        """(attention's result, its rotated queries, keys and values)."""
        qkv = self._qkv(layer, weights, step, x, phase, again=again)
        is_rotated = again and self.kept.of("qkv", layer, step.tokens) is not None
        parts = self._rotate(weights, step, qkv, phase, is_rotated=is_rotated)
        window = self._window(layer, step)
        return self._attention.forward(parts, step.documents, window), parts

    def _qkv(
        self,
        layer: int,
        weights: FrozenLayer,
        step: Step,
        x: torch.Tensor,
        phase: Phase,
        *,
        again: bool,
    ) -> torch.Tensor:
        """Products with q, k and v, [tokens, columns]; leaves the normalised input in its place."""
        normed = phase["normed"][: step.tokens]
        rms_norm(x, weights.input_norm, self._forward.rms_norm_eps, normed)
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
                rotate(both, rotary, step.positions, None, eps, both)
            return query, key, value
        rotated = phase["rotated"][: step.tokens].unflatten(1, (-1, self._widths.head_dim))
        new_query, new_key = rotated.split((query.shape[1], key.shape[1]), dim=1)
        rotate(query, rotary, step.positions, weights.q_norm, eps, new_query)
        rotate(key, rotary, step.positions, weights.k_norm, eps, new_key)
        return new_query, new_key, value

    def backward(
        self, layer: int, weights: FrozenLayer, step: Step, x: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """Gradients of the layer's adapters, in their buffer, and of its input, in its output's.

        Args:
            layer: Its index. Nothing below the first is trained: its input gets no gradient.
            weights: Of the layer.
            step: As forward took it.
            x: The layer's input.
            grad: Of its output, [tokens, hidden].
        """
        self._buffers["adapters"].copy_(self._adapters.values[layer])
        attended, parts = self.kept.take_attended(layer), None
        late = self._phases["backward.attention"]
        if attended is None:
            # Its block has what attention needs again.
            late.open(self._device)
            attended, parts = self._attend(layer, weights, step, x, late, again=True)
        self._mlp_backward(layer, weights, step, x, attended, grad)
        if parts is None:
            late.open(self._device)
        self._attention_backward(layer, weights, step, x, attended, parts, grad)
        late.close()

    def _mlp_backward(
        self,
        layer: int,
        weights: FrozenLayer,
        step: Step,
        x: torch.Tensor,
        attended: Attended,
        grad: torch.Tensor,
    ) -> None:
        """Turns the gradient of the layer's output into that of the states before its MLP."""
        tokens, eps = step.tokens, self._forward.rms_norm_eps
        with opened(self._phases["backward.mlp"], self._device) as phase:
            mid = self.kept.of("mid", layer, tokens)
            if mid is None:
                mid = phase["mid"][:tokens]
                self._product("o", layer, weights, step, phase).forward(
                    attended.out, mid, x, again=True
                )
            normed, gated = phase["normed"][:tokens], phase["gated"][:tokens]
            grad_low = phase["grad_low"][:tokens]
            down = self._product("down", layer, weights, step, phase)
            down.grad_of_input(grad, grad_low, gated)
            rms_norm(mid, weights.post_norm, eps, normed)
            product = self._product("gate_up", layer, weights, step, phase)
            gate_up = self.kept.of("gate_up", layer, tokens)
            if gate_up is None:
                gate_up = phase["gate_up"][:tokens]
                product.forward(normed, gate_up, again=True, adds_low=not self._gates_low)
            gate, up = gate_up.chunk(2, dim=1)
            if self._gates_low:
                silu_mul_low_backward(gate, up, *self._low_of_gate(layer, step), gated)
            else:
                silu_mul_backward(gate, up, gated)
            down.grad_of_adapters(grad, gated, grad_low)
            grad_normed = phase["grad_normed"][:tokens]
            product.backward(gate_up, normed, grad_low, grad_normed)
            rms_norm_backward(grad_normed, mid, weights.post_norm, eps, grad, True)

    def _attention_backward(
        self,
        layer: int,
        weights: FrozenLayer,
        step: Step,
        x: torch.Tensor,
        attended: Attended,
        parts: tuple[torch.Tensor, ...] | None,
        grad: torch.Tensor,
    ) -> None:
        """Turns the gradient of the states before the MLP into that of the layer's input."""
        tokens, phase = step.tokens, self._phases["backward.attention"]
        eps, w = self._forward.rms_norm_eps, self._widths
        grad_low = phase["grad_low"][:tokens]
        across = phase["grad_normed"].view(-1)
        above = across[: tokens * w.queries].view(tokens, w.queries)
        self._product("o", layer, weights, step, phase).backward(
            grad, attended.out, grad_low, above
        )
        if parts is None:
            qkv = self._qkv(layer, weights, step, x, phase, again=True)
            is_rotated = self.kept.of("qkv", layer, tokens) is not None
            parts = self._rotate(weights, step, qkv, phase, is_rotated=is_rotated)
        else:
            kept = self.kept.of("qkv", layer, tokens)
            qkv = phase["qkv"][:tokens] if kept is None else kept
        window = self._window(layer, step)
        grads = self._attention.backward(above, parts, attended, step.documents, window)
        del parts, attended
        rotary, places = self._buffers["rotary"], self._heads(qkv)
        for found, place, norm in zip(
            grads[:2], places[:2], (weights.q_norm, weights.k_norm), strict=True
        ):
            rotate_backward(found, place, rotary, step.positions, norm, eps, place)
        places[2].copy_(grads[2])
        del grads, found
        normed = phase["normed"][:tokens]
        product = self._product("qkv", layer, weights, step, phase)
        if layer == 0:
            product.backward(qkv, normed, grad_low, None)
            return
        grad_normed = across[: tokens * w.hidden].view(tokens, w.hidden)
        product.backward(qkv, normed, grad_low, grad_normed)
        rms_norm_backward(grad_normed, x, weights.input_norm, eps, grad, True)

    def _product(
        self, kind: str, layer: int, weights: FrozenLayer, step: Step, phase: Phase
    ) -> Product:
        dropout = None
        if step.drops:
            number = layer * len(_KINDS) + _KINDS.index(kind)
            dropout = Dropout(
                probability=self._dropout,
                seed=(step.seed + (number + 1) * _SEED_STEP) & 0x7FFFFFFF,
                dropped=phase["dropped"],
            )
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
        self, layer: int, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """What silu_mul_low takes of the adapters."""
        low_rows = self._low_rows("gate_up", layer, step.tokens)
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
            return phase[name][: step.tokens]
        columns = self._widths.qkv if name == "qkv" else 2 * self._widths.mlp
        return self._buffers["grad"].new_empty(step.tokens, columns)
