"""The last norm, the head and the loss, with the gradient of the hidden states, in pieces.

Logits of all tokens never exist: those of some become their own gradient in place, and that the
gradient of hidden states (Liger Kernel, arXiv:2410.10989; Cut Cross-Entropy, arXiv:2411.09009).
Tokens without a label are no part of it.
"""

from __future__ import annotations

import torch

from oomproof.memory.training_buffers import loss_tokens
from oomproof.memory.training_shape import TrainingShape
from oomproof.models.forward import ForwardSpec
from oomproof.models.spec import ModelSpec
from oomproof.tuning.activations import Phase
from oomproof.tuning.frozen import FrozenModel
from oomproof.tuning.operators import cross_entropy_, rms_norm, rms_norm_backward


class HeadLoss:
    """Computes it.

    Args:
        spec: The model.
        forward: Its numbers.
        shape: Of a step.
        model: Its weights.
        losses: float32 [tokens], of each.
    """

    def __init__(
        self,
        spec: ModelSpec,
        forward: ForwardSpec,
        shape: TrainingShape,
        model: FrozenModel,
        losses: torch.Tensor,
    ) -> None:
        self._forward, self._model, self._losses = forward, model, losses
        self._phase = Phase(spec, shape, "loss", losses.device)
        self._step = loss_tokens(spec, shape)

    def run(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        labels: torch.Tensor,
        scale: torch.Tensor,
        *,
        trains: bool,
    ) -> torch.Tensor:
        """The sum of losses times the scale, float32 [].

        Args:
            hidden: Hidden states, float32 [tokens, hidden]; where `trains`, replaced by their
                gradients.
            rows: int64 [counted]: the tokens that have a label.
            labels: int64 [counted]: the labels.
            scale: float32 [1]: one over what the sum is divided by.
            trains: Whether gradients are wanted.
        """
        phase, forward = self._phase, self._forward
        weight, eps = self._model.final_norm, forward.rms_norm_eps
        phase.open(len(hidden))
        for first in range(0, len(rows), self._step):
            picked_rows = rows[first : first + self._step]
            count = len(picked_rows)
            picked, normed = phase["picked"][:count], phase["normed"][:count]
            logits = phase["logits"][:count]
            torch.index_select(hidden, 0, picked_rows, out=picked)
            rms_norm(picked, weight, eps, normed)
            torch.mm(normed, self._model.head.t(), out=logits)
            losses = self._losses[first : first + count]
            wanted = labels[first : first + count]
            cross_entropy_(logits, wanted, 1 / forward.logits_divisor, scale, losses, trains)
            if not trains:
                continue
            torch.mm(logits, self._model.head, out=normed)
            rms_norm_backward(normed, picked, weight, eps, picked, False, None)
            hidden.index_copy_(0, picked_rows, picked)
        phase.close()
        if trains and len(rows) < len(hidden):
            others = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            others[rows] = False
            hidden.masked_fill_(others.unsqueeze(1), 0)
        return self._losses[: len(rows)].sum() * scale.view(())
