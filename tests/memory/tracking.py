"""Bytes that operators allocate, without an allocator that counts them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Tracked(TorchDispatchMode):
    """Counts the bytes of the storages of a device that operators make, while they are alive.

    Args:
        device: Whose storages.
        rounding: What each storage's bytes are rounded up to.
        known: Tensors whose storages are not counted.
    """

    def __init__(
        self, device: torch.device, *, rounding: int = 1, known: Iterable[torch.Tensor] = ()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._device, self._rounding = device, rounding
        self._seen = {one.untyped_storage()._cdata for one in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_flatten(out)[0]:
            if isinstance(one, torch.Tensor) and one.device == self._device:
                self._count(one.untyped_storage())
        return out

    def grow(self, size: int) -> None:
        """Counts bytes that no operator tells of."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def rounded(self, size: int) -> int:
        """As the allocator hands them out."""
        return -(-size // self._rounding) * self._rounding

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, self.rounded(storage.nbytes())
        if key in self._seen:
            return
        self._seen.add(key)
        self.grow(size)

        def gone() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)
