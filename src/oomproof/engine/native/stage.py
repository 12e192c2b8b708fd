"""One device's part of the decoder: its layers over its arena, and the head where it is here.

It knows the order in which a layer computes and nothing of requests, graphs or files. Everything it
writes is a view of the arena, so a call allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from oomproof.engine.native.arena import Arena
from oomproof.engine.native.kv_pool import KVPool
from oomproof.engine.native.linears import Chain, Projection, StepNorm, TiledLinears
from oomproof.engine.native.lora import NO_LORA, LayerLora, Lora, LoraWeights
from oomproof.engine.native.norm_cuda import add_rms_norm_step, supports_norm
from oomproof.engine.native.operators import add_rms_norm, attend, rotate_and_store, silu_mul
from oomproof.engine.native.step import step_attention
from oomproof.engine.native.waiting import may_wait
from oomproof.engine.native.weights import LayerWeights, StepProducts
from oomproof.memory.native import up_bytes
from oomproof.models.forward import ForwardSpec
from oomproof.quantization.tiled_launch import MAX_TOKENS

LayerSource = Callable[[int], LayerWeights]
"""Layer index → its weights, on the device when the stream gets there."""
_FEW_ROWS = 256
"""Tokens up to which the norm that decode steps have takes the less."""


class Layers:
    """A contiguous range of decoder layers on one device.

    Args:
        arena: The device's buffers.
        pool: Its keys and values.
        forward: The model's numbers.
        first: Index of the first layer.
        last: Index of the last one.
        weights: Gives each layer's weights.
        done: Told that a layer's weights have been read, for those that are streamed.
        lora: What is added to their products, None for nothing.
    """

    def __init__(
        self,
        arena: Arena,
        pool: KVPool,
        forward: ForwardSpec,
        layers: tuple[int, int],
        weights: LayerSource,
        done: Callable[[int], None],
        *,
        lora: LoraWeights | None = None,
    ) -> None:
        self._forward = forward
        self._pool = pool
        self._first, self._last = layers
        self._weights = weights
        self._done = done
        self._hidden, self._normed = arena["hidden"], arena["normed"]
        self._qkv, self._attended = arena["qkv"], arena["attended"]
        self._gated = arena["gated"]
        self._partials, self._rotary = arena["partials"], arena["rotary"]
        self._inputs = arena["inputs"]
        self._scratch = arena["scratch"]
        self._loras: dict[int, LayerLora] = {}
        if lora is not None:
            self._lora_scratch = arena["lora"]
            self._loras = {index: lora.layer(index) for index in range(layers[0], layers[1] + 1)}
        self._up, self._scratch_before_up = self._split_scratch()
        self._hidden_next = arena["hidden_next"]
        self._step_attention = step_attention(arena, pool, forward)
        # None where products have to be computed one by one.
        self._chain = (
            None
            if not may_wait(arena.memory.device, self)
            else Chain(
                squares=arena["squares"],
                counters=arena["product_counters"],
                scratch=self._scratch,
                eps=forward.rms_norm_eps,
                multiplier=forward.residual_multiplier,
            )
        )

    def _split_scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(where up waits for its gate, [numbers], what products have beside it)."""
        tokens, width = self._gated.shape
        size = up_bytes(
            tokens=tokens,
            hidden=self._hidden.shape[1],
            width=width,
            itemsize=self._gated.itemsize,
        )
        first = self._scratch.numel() - size
        return self._scratch[first:].view(self._gated.dtype), self._scratch[:first]

    def run(self, rows: int, *, one_request: bool, most_layers: int | None = None) -> None:
        """Every layer over the first `rows` rows of the hidden states.

        Args:
            rows: Tokens of this call.
            one_request: Whether they are consecutive tokens of one request, or one of each.
            most_layers: Stop after so many, to bring their kernels in; None for all.
        """
        count = self._last - self._first + 1
        end = self._first + min(count, most_layers or count)
        normed = self._normed[:rows]
        # The hidden states, and where fused products put the updated ones: they change places.
        states = [self._hidden[:rows], self._hidden_next[:rows]]
        # Whether an update waits in `normed`; whether the hidden states' squares are known.
        adds = known = False
        for index in range(self._first, end):
            weights, lora = self._weights(index), self._loras.get(index, NO_LORA)
            step = weights.step if rows <= MAX_TOKENS else None
            chain = self._chain if lora.chains else None
            if step is not None and chain is not None and step.chains(rows, chain):
                self._chained(
                    weights,
                    step,
                    lora,
                    index,
                    states[0],
                    one_request=one_request,
                    adds=adds,
                    known=known,
                )
                adds, known = False, True
            else:
                self._layer(weights, step, lora, index, states, one_request=one_request, adds=adds)
                adds, known = True, False
            self._done(index)
        # The last update is added where the hidden states go: no norm here is the next layer's.
        if adds:
            multiplier = self._forward.residual_multiplier
            torch.add(states[0], normed, alpha=multiplier, out=self._hidden[:rows])
        elif states[0].data_ptr() != self._hidden.data_ptr():
            self._hidden[:rows].copy_(states[0])

    def _chained(
        self,
        weights: LayerWeights,
        products: StepProducts,
        lora: LayerLora,
        index: int,
        hidden: torch.Tensor,
        *,
        one_request: bool,
        adds: bool,
        known: bool,
    ) -> None:
        """A layer of few tokens, whose products update the hidden states and normalise them."""
        rows, chain = len(hidden), self._chain
        assert chain is not None
        normed, attended = self._normed[:rows], self._attended[:rows]
        qkv, gated = self._qkv[:rows], self._gated[:rows]
        # An adapter multiplies what is normalised, which a fused product keeps to itself.
        if known and lora.qkv is None:
            norm_weight = weights.input_norm
            products.qkv.chained(hidden, qkv, chain, norm_weight=norm_weight, before_attention=True)
        else:
            self._normalise(weights.input_norm, hidden, normed, adds=adds)
            products.qkv.chained(normed, qkv, chain, before_attention=True)
            self._adapt(lora.qkv, normed, qkv)
        self._attend(weights, index, rows, one_request=one_request)
        products.o.chained(attended, hidden, chain, updates=True)
        if lora.gate_up is None:
            norm_weight = weights.post_norm
            products.gate_up.chained(hidden, gated, chain, norm_weight=norm_weight, gated=True)
        else:
            self._normalise(weights.post_norm, hidden, normed, adds=False)
            self._gate(weights, products, lora.gate_up, normed, gated)
        products.down.chained(gated, hidden, chain, updates=True)

    def _layer(
        self,
        weights: LayerWeights,
        products: StepProducts | None,
        lora: LayerLora,
        index: int,
        states: list[torch.Tensor],
        *,
        one_request: bool,
        adds: bool,
    ) -> None:
        """A layer whose updates of the hidden states wait in `normed`.

        Args:
            weights: Of the layer.
            products: What computes few tokens, fused with what lies between; None for others.
            lora: What is added to its products.
            index: Of the layer.
            states: The hidden states, and where fused products put the updated ones.
            one_request: Whether the rows are consecutive tokens of one request.
            adds: Whether an update waits.
        """
        rows = len(states[0])
        normed, attended = self._normed[:rows], self._attended[:rows]
        qkv, gated = self._qkv[:rows], self._gated[:rows]
        if products is not None and lora.qkv is None:
            self._step_product(products.qkv, weights.input_norm, states, qkv, adds=adds)
        else:
            self._normalise(weights.input_norm, states[0], normed, adds=adds)
            self._multiply(weights.qkv, None if products is None else products.qkv, normed, qkv)
            self._adapt(lora.qkv, normed, qkv)
        self._attend(weights, index, rows, one_request=one_request)
        self._multiply(weights.o, None if products is None else products.o, attended, normed)
        self._adapt(lora.o, attended, normed)
        if products is not None and lora.gate_up is None:
            post_norm = weights.post_norm
            self._step_product(products.gate_up, post_norm, states, gated, adds=True, gated=True)
        else:
            self._normalise(weights.post_norm, states[0], normed, adds=True)
            self._gate(weights, products, lora.gate_up, normed, gated)
        self._multiply(weights.down, None if products is None else products.down, gated, normed)
        self._adapt(lora.down, gated, normed)

    def _normalise(
        self, weight: torch.Tensor, hidden: torch.Tensor, normed: torch.Tensor, *, adds: bool
    ) -> None:
        """The hidden states, after the update that waits in `normed` where `adds`."""
        eps, multiplier = self._forward.rms_norm_eps, self._forward.residual_multiplier
        _norm(normed)(hidden, normed, weight, eps, multiplier, adds)

    def _multiply(
        self, whole: Projection, step: TiledLinears | None, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        """By what decode steps have, where they have it."""
        if step is None:
            whole.multiply(x, out, self._scratch)
        else:
            step.step(x, out, self._scratch)

    def _adapt(self, lora: Lora | None, x: torch.Tensor, out: torch.Tensor) -> None:
        """Adds what an adapter does to the product of x that is in out."""
        if lora is not None:
            lora.add(x, out, self._lora_scratch)

    def _step_product(
        self,
        product: TiledLinears,
        norm_weight: torch.Tensor,
        states: list[torch.Tensor],
        out: torch.Tensor,
        *,
        adds: bool,
        gated: bool = False,
    ) -> None:
        """Updates the hidden states and multiplies them, normalised."""
        normed = self._normed[: len(out)]
        # A prompt may have more tokens than a decode step, for which there is room.
        if len(states[1]) < len(out) or not product.normalises(len(out)):
            self._normalise(norm_weight, states[0], normed, adds=adds)
            product.step(normed, out, self._scratch, gated=gated)
            return
        before = StepNorm(
            update=normed if adds else None,
            weight=norm_weight,
            hidden_out=states[1],
            eps=self._forward.rms_norm_eps,
            multiplier=self._forward.residual_multiplier,
        )
        product.step(states[0], out, self._scratch, norm=before, gated=gated)
        states.reverse()

    def _gate(
        self,
        weights: LayerWeights,
        products: StepProducts | None,
        lora: Lora | None,
        normed: torch.Tensor,
        gated: torch.Tensor,
    ) -> None:
        """SwiGLU: both products wait in scratch; or up's does, in slices, the gate's in `gated`."""
        tiled = weights.gate_up.tiled
        if lora is None and tiled is not None and tiled.gates:
            tiled.multiply_gated(normed, gated, self._scratch)
            return
        (rows, width), scratch = gated.shape, self._scratch_before_up
        if 2 * gated.numel() <= self._up.numel():
            gate_up = self._up[: 2 * gated.numel()].view(rows, 2 * width)
            if products is None:
                weights.gate_up.multiply(normed, gate_up, scratch)
            else:
                products.gate_up.step(normed, gate_up, scratch)
            if lora is None:
                silu_mul(gate_up[:, :width], gate_up[:, width:], gated)
            else:
                lora.down(normed, self._lora_scratch)
                lora.up_gated(gate_up, gated, self._lora_scratch)
            return
        weights.gate.multiply(normed, gated, scratch)
        if lora is not None:
            lora.down(normed, self._lora_scratch)
            lora.up(gated, 0, self._lora_scratch)
        first = 0
        for part in weights.up:
            up = self._up[: rows * part.rows].view(rows, part.rows)
            part.multiply(normed, up, scratch)
            if lora is not None:
                lora.up(up, width + first, self._lora_scratch)
            gate = gated[:, first : first + part.rows]
            silu_mul(gate, up, gate)
            first += part.rows

    def _attend(self, weights: LayerWeights, index: int, rows: int, *, one_request: bool) -> None:
        if not one_request and self._step_attention is not None:
            self._step_attention.run(index, rows, weights.q_norm, weights.k_norm)
            return
        qkv, attended = self._qkv[:rows], self._attended[:rows]
        _, positions, slots = (row[:rows] for row in self._inputs)
        keys, values = self._pool.layer(index)
        window = self._pool.window(index)
        pages = self._pool.tables[window]
        rotate_and_store(
            qkv,
            self._rotary,
            positions,
            slots,
            pages,
            keys,
            values,
            weights.q_norm,
            weights.k_norm,
            self._forward.rms_norm_eps,
        )
        attend(
            qkv,
            positions,
            slots,
            pages,
            keys,
            values,
            attended,
            self._partials,
            self._forward.attention_scale,
            window,
            one_request,
        )


def _norm(states: torch.Tensor) -> Callable[..., None]:
    """The norm for so many tokens."""
    few = len(states) <= _FEW_ROWS and supports_norm(states)
    return add_rms_norm_step if few else add_rms_norm
