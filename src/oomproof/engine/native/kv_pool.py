"""The paged KV pool of one device: keys and values of every planned token, allocated once.

Layers that look back equally far share a page table: a request's n-th page is the same number in
each of them. A layer with a sliding window has fewer pages a request, used as a ring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from oomproof.formats import DType, ceil_div
from oomproof.memory.kv_cache import PAGE_TOKENS
from oomproof.memory.native import WHOLE, Share, layer_kv_bytes, layer_pages
from oomproof.models.spec import ModelSpec


class PageAllocator:
    """Hands out the pages of the layers that look back equally far.

    Args:
        requests: Requests at once.
        pages_per_request: The most that one of them has.
    """

    def __init__(self, requests: int, pages_per_request: int) -> None:
        self.pages_per_request = pages_per_request
        self._free = list(range(requests * pages_per_request))[::-1]
        self._taken: dict[int, list[int]] = {}

    def needed(self, tokens: int) -> int:
        """Pages of a request of that many tokens."""
        return min(ceil_div(tokens, PAGE_TOKENS), self.pages_per_request)

    def has_room(self, tokens: int) -> bool:
        """Whether a request of that many tokens finds its pages now."""
        return self.needed(tokens) <= len(self._free)

    def take(self, slot: int, tokens: int) -> list[int]:
        """The pages of a request, in the order of its tokens."""
        self._taken[slot] = [self._free.pop() for _ in range(self.needed(tokens))]
        return self._taken[slot]

    def give_back(self, slot: int) -> None:
        """Frees a request's pages."""
        self._free += self._taken.pop(slot)[::-1]


class KVPool:
    """Keys and values of a range of layers on one device.

    Args:
        spec: The model.
        layers: First and last layer, both included.
        context: Planned tokens of a request.
        concurrency: Requests at once.
        dtype: Of keys and values; float8_e4m3fn is kept without a scale.
        device: Where it lives.
        tables: Window (0 for none) → int32 [slots, pages of a request] on the device.
        share: The rank's part of the KV heads.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: tuple[int, int],
        *,
        context: int,
        concurrency: int,
        dtype: DType,
        device: torch.device,
        tables: Mapping[int, torch.Tensor],
        share: Share = WHOLE,
    ) -> None:
        first, last = layers
        self.first = first
        """Index of its first layer."""
        attention = spec.attention[first : last + 1]
        self.tables = tables
        sizes = [
            layer_kv_bytes(
                layer, context=context, concurrency=concurrency, dtype=dtype, share=share
            )
            for layer in attention
        ]
        element: torch.dtype = getattr(torch, dtype)
        self.memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self.size_bytes = self.memory.nbytes
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._windows = {
            index: layer.sliding_window or 0 for index, layer in enumerate(attention, first)
        }
        for index, (layer, raw) in enumerate(
            zip(attention, self.memory.split(sizes), strict=True), first
        ):
            pages = concurrency * layer_pages(layer, context)
            whole = raw.view(element).view(
                2,
                pages,
                share.of(layer.num_key_value_heads, "KV heads"),
                PAGE_TOKENS,
                layer.key_head_dim,
            )
            self._layers[index] = (whole[0], whole[1])

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each [pages, kv heads, PAGE_TOKENS, head dim]."""
        return self._layers[index]

    def window(self, index: int) -> int:
        """Tokens that a layer looks back at; 0 for all."""
        return self._windows[index]

    def assign(self, slot: int, pages: Mapping[int, Sequence[int]]) -> None:
        """Tells the device which pages a request has: window → page numbers."""
        for window, table in self.tables.items():
            listed = torch.tensor(pages[window], dtype=torch.int32)
            table[slot, : len(listed)].copy_(listed)
