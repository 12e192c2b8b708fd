"""A LoRA adapter's A and B in host memory, from the header that was read before."""

from __future__ import annotations

from pathlib import Path

import torch

from oomproof.loading.reader import CheckpointReader
from oomproof.models.adapter import AdapterSpec

_CPU = torch.device("cpu")


def read_values(adapter: AdapterSpec) -> dict[str, torch.Tensor]:
    """The file's name of each A and B → its values, in the file's dtype.

    Raises:
        CheckpointError: The file cannot be read, or holds a value that is not finite.
    """
    reader = CheckpointReader(Path(adapter.path), adapter.checkpoint, lambda _name: _CPU)
    with reader.open() as tensors:
        return {name: tensor[...] for name, tensor in tensors.items()}
