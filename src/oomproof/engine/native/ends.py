"""What is before the first layer and behind the last: tokens to hidden states, those to logits."""

from __future__ import annotations

import torch

from oomproof.engine.native.arena import Arena
from oomproof.engine.native.operators import add_rms_norm


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
