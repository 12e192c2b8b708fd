"""A device's buffers, by name."""

from __future__ import annotations

import torch

from oomproof.memory.arena import Layout


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
