"""One device's part of the decoder: its layers over its arena, and the head where it is here.

It knows the order in which a layer computes and nothing of requests, graphs or files. Everything it
writes is a view of the arena, so a call allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from oomproof.engine.native.arena import Arena
from oomproof.engine.native.kv_pool import KVPool
from oomproof.engine.native.linears import Chain, StepNorm, TiledLinears
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
    """

    def __init__(
        self,
        arena: Arena,
        pool: KVPool,
        forward: ForwardSpec,
        layers: tuple[int, int],
        weights: LayerSource,
        done: Callable[[int], None],
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
            weights = self._weights(index)
            step = weights.step if rows <= MAX_TOKENS else None
            chain = self._chain
            if step is not None and chain is not None and step.chains(rows, chain):
                self._chained(
                    weights,
                    step,
                    index,
                    states[0],
                    chain,
                    one_request=one_request,
                    adds=adds,
                    known=known,
                )
                adds, known = False, True
            else:
                if step is not None:
                    self._step(weights, step, index, states, one_request=one_request, adds=adds)
                else:
                    self._parts(weights, index, states[0], one_request=one_request, adds=adds)
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
        index: int,
        hidden: torch.Tensor,
        chain: Chain,
        *,
        one_request: bool,
        adds: bool,
        known: bool,
    ) -> None:
        """A layer of few tokens, whose products update the hidden states and normalise them."""
        rows = len(hidden)
        normed, attended = self._normed[:rows], self._attended[:rows]
        qkv, gated = self._qkv[:rows], self._gated[:rows]
        if known:
            norm_weight = weights.input_norm
            products.qkv.chained(hidden, qkv, chain, norm_weight=norm_weight, before_attention=True)
        else:
            _norm(normed)(hidden, normed, weights.input_norm, chain.eps, chain.multiplier, adds)
            products.qkv.chained(normed, qkv, chain, before_attention=True)
        self._attend(weights, index, rows, one_request=one_request)
        products.o.chained(attended, hidden, chain, updates=True)
        products.gate_up.chained(hidden, gated, chain, norm_weight=weights.post_norm, gated=True)
        products.down.chained(gated, hidden, chain, updates=True)

    def _step(
        self,
        weights: LayerWeights,
        products: StepProducts,
        index: int,
        states: list[torch.Tensor],
        *,
        one_request: bool,
        adds: bool,
    ) -> None:
        """A layer of few tokens whose products are fused with what lies between them."""
        rows = len(states[0])
        normed, attended = self._normed[:rows], self._attended[:rows]
        qkv, gated = self._qkv[:rows], self._gated[:rows]
        self._step_product(products.qkv, weights.input_norm, states, qkv, adds=adds)
        self._attend(weights, index, rows, one_request=one_request)
        products.o.step(attended, normed, self._scratch)
        self._step_product(
            products.gate_up, weights.post_norm, states, gated, adds=True, gated=True
        )
        products.down.step(gated, normed, self._scratch)

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
        eps, multiplier = self._forward.rms_norm_eps, self._forward.residual_multiplier
        # A prompt may have more tokens than a decode step, for which there is room.
        if len(states[1]) < len(out) or not product.normalises(len(out)):
            _norm(normed)(states[0], normed, norm_weight, eps, multiplier, adds)
            product.step(normed, out, self._scratch, gated=gated)
            return
        before = StepNorm(
            update=normed if adds else None,
            weight=norm_weight,
            hidden_out=states[1],
            eps=eps,
            multiplier=multiplier,
        )
        product.step(states[0], out, self._scratch, norm=before, gated=gated)
        states.reverse()

    def _parts(
        self,
        weights: LayerWeights,
        index: int,
        hidden: torch.Tensor,
        *,
        one_request: bool,
        adds: bool,
    ) -> None:
        """A layer, operator after operator."""
        rows = len(hidden)
        normed, attended = self._normed[:rows], self._attended[:rows]
        eps, multiplier = self._forward.rms_norm_eps, self._forward.residual_multiplier
        norm = _norm(normed)
        norm(hidden, normed, weights.input_norm, eps, multiplier, adds)
        weights.qkv.multiply(normed, self._qkv[:rows], self._scratch)
        self._attend(weights, index, rows, one_request=one_request)
        weights.o.multiply(attended, normed, self._scratch)
        norm(hidden, normed, weights.post_norm, eps, multiplier, True)
        self._gate(weights, normed, self._gated[:rows])
        weights.down.multiply(self._gated[:rows], normed, self._scratch)

    def _gate(self, weights: LayerWeights, normed: torch.Tensor, gated: torch.Tensor) -> None:
        """SwiGLU: the gate's product goes where the result will be, up's waits in scratch."""
        tiled = weights.gate_up.tiled
        if tiled is not None and tiled.gates:
            tiled.multiply_gated(normed, gated, self._scratch)
            return
        (rows, width), scratch = gated.shape, self._scratch_before_up
        if 2 * gated.numel() <= self._up.numel():
            gate_up = self._up[: 2 * gated.numel()].view(rows, 2 * width)
            weights.gate_up.multiply(normed, gate_up, scratch)
            silu_mul(gate_up[:, :width], gate_up[:, width:], gated)
            return
        weights.gate.multiply(normed, gated, scratch)
        first = 0
        for part in weights.up:
            up = self._up[: rows * part.rows].view(rows, part.rows)
            part.multiply(normed, up, scratch)
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


class Embedding:
    """Tokens to hidden states.

    Args:
        arena: The device's buffers.
        weight: [vocab, hidden].
        multiplier: Of the embeddings.
    """

    def __init__(self, arena: Arena, weight: torch.Tensor, multiplier: float) -> None:
        self._inputs, self._hidden = arena["inputs"], arena["hidden"]
        self._weight = weight
        self._multiplier = multiplier

    def run(self, rows: int) -> None:
        """The embeddings of the first `rows` tokens."""
        hidden = self._hidden[:rows]
        torch.index_select(self._weight, 0, self._inputs[0, :rows], out=hidden)
        if self._multiplier != 1:
            hidden.mul_(self._multiplier)


class FinalNorm:
    """The last norm, over the rows whose logits are wanted."""

    def __init__(self, arena: Arena, weight: torch.Tensor, eps: float) -> None:
        self._hidden, self._normed = arena["hidden"], arena["normed"]
        self._weight = weight
        self._eps = eps

    def run(self, first: int, rows: int) -> torch.Tensor:
        """Normalised hidden states of rows first … first + rows - 1: [rows, hidden]."""
        normed = self._normed[first : first + rows]
        hidden = self._hidden[first : first + rows]
        add_rms_norm(hidden, normed, self._weight, self._eps, 1.0, False)
        return normed


class Head:
    """Hidden states to logits.

    Args:
        arena: The device's buffers.
        weight: [vocab, hidden].
        divisor: Of the logits.
    """

    def __init__(self, arena: Arena, weight: torch.Tensor, divisor: float) -> None:
        self._last_hidden, self._out = arena["last_hidden"], arena["head_out"]
        self.logits = arena["logits"]
        """float32 [requests, vocab]."""
        self._weight = weight
        self._divisor = divisor

    def receive(self, normed: torch.Tensor) -> None:
        """Takes normalised hidden states [rows, hidden] from any device."""
        self._last_hidden[: len(normed)].copy_(normed, non_blocking=True)

    def run(self, rows: int) -> torch.Tensor:
        """Logits float32 [rows, vocab] of what was received last."""
        out, logits = self._out[:rows], self.logits[:rows]
        torch.mm(self._last_hidden[:rows], self._weight.t(), out=out)
        logits.copy_(out)
        if self._divisor != 1:
            logits.div_(self._divisor)
        return logits
