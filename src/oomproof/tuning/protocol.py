"""What the loop needs of a model; ours and peft's are built elsewhere and both have it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch


class LossOutput(Protocol):
    """What a forward pass of training returns."""

    @property
    def loss(self) -> torch.Tensor:
        """Scalar: the sum of the learned tokens' losses over `num_items_in_batch`."""


class TrainingModel(Protocol):
    """A `torch.nn.Module` of which only the adapter's parameters require gradients."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> LossOutput:
        """The loss of a micro-batch.

        Args:
            input_ids: [rows, tokens].
            labels: [rows, tokens]: the token itself where it is learned, else -100; the model
                compares each with what the token before it predicts.
            position_ids: [rows, tokens]: from 0 in each document; tokens see their own only.
            num_items_in_batch: What the sum is divided by; None for the labels that count.
        """

    def save_adapter(self, folder: Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors, as peft reads them."""

    def load_adapter(self, folder: Path) -> None:
        """Takes the adapter's values from a folder that `save_adapter` wrote."""
