"""One device's part of the decoder: its layers over its arena, and the head where it is here.

It knows the order in which a layer computes and nothing of requests, graphs or files. Everything it
writes is a view of the arena, so a call allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from oomproof.engine.native.kv_pool import KVPool
from oomproof.engine.native.operators import add_rms_norm, attend, rotate_and_store, silu_mul
from oomproof.engine.native.weights import LayerWeights
from oomproof.memory.arena import Layout
from oomproof.models.forward import ForwardSpec

LayerSource = Callable[[int], LayerWeights]
"""Layer index → its weights, on the device when the stream gets there."""


class Arena:
    """The buffers of a layout, carved from one allocation.

    Args:
        layout: What lies where.
        device: Where it lives.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.memory = torch.zeros(layout.size_bytes, dtype=torch.uint8, device=device)

    def __contains__(self, name: str) -> bool:
        return name in self.layout.buffers

    def __getitem__(self, name: str) -> torch.Tensor:
        """The buffer of that name, in its shape."""
        buffer, offset = self.layout.buffers[name], self.layout.offsets[name]
        dtype: torch.dtype = getattr(torch, buffer.dtype)
        raw = self.memory[offset : offset + buffer.size_bytes]
        return raw.view(dtype).view(buffer.shape)


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
        self._gate_up, self._gated = arena["gate_up"], arena["gated"]
        self._partials, self._rotary = arena["partials"], arena["rotary"]
        self._inputs = arena["inputs"]
        self._scratch = arena["scratch"]

    def run(self, rows: int, *, one_request: bool, most_layers: int | None = None) -> None:
        """Every layer over the first `rows` rows of the hidden states.

        Args:
            rows: Tokens of this call.
            one_request: Whether they are consecutive tokens of one request, or one of each.
            most_layers: Stop after so many, to bring their kernels in; None for all.
        """
        count = self._last - self._first + 1
        end = self._first + min(count, most_layers or count)
        hidden, normed = self._hidden[:rows], self._normed[:rows]
        eps, multiplier = self._forward.rms_norm_eps, self._forward.residual_multiplier
        adds = False
        for index in range(self._first, end):
            weights = self._weights(index)
            add_rms_norm(hidden, normed, weights.input_norm, eps, multiplier, adds)
            self._attention(weights, index, rows, one_request=one_request)
            add_rms_norm(hidden, normed, weights.post_norm, eps, multiplier, True)
            self._mlp(weights, rows)
            self._done(index)
            adds = True
        # The last update is added where the hidden states go: no norm here is the next layer's.
        hidden.add_(normed, alpha=multiplier)

    def _attention(
        self, weights: LayerWeights, index: int, rows: int, *, one_request: bool
    ) -> None:
        normed, qkv, attended = self._normed[:rows], self._qkv[:rows], self._attended[:rows]
        _, positions, slots = (row[:rows] for row in self._inputs)
        keys, values = self._pool.layer(index)
        window = self._pool.window(index)
        pages = self._pool.tables[window]
        weights.qkv.multiply(normed, qkv, self._scratch)
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
        weights.o.multiply(attended, normed, self._scratch)

    def _mlp(self, weights: LayerWeights, rows: int) -> None:
        normed, gate_up, gated = self._normed[:rows], self._gate_up[:rows], self._gated[:rows]
        weights.gate_up.multiply(normed, gate_up, self._scratch)
        silu_mul(gate_up, gated)
        weights.down.multiply(gated, normed, self._scratch)


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
