"""Random weights at a model's true shapes, made where they belong: no file, no download."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import EllipsisType

import torch

from oomproof.loading.reader import SAFETENSORS_NAMES, Progress
from oomproof.models.spec import ModelSpec, Role, TensorSpec

STANDARD_DEVIATION = 0.02
"""Of the weights, as most models are initialised with; norms are 1."""


class RandomTensors:
    """Hands out a model's tensors as `loading.reader.CheckpointReader` does.

    Each is made on its device in the checkpoint's own dtype, so that what follows (conversion,
    quantization, placement) is what it would be for the real one.

    Args:
        spec: Names, shapes and roles; its dtype is the checkpoint's.
        device_of: Tensor name → the device it goes to.
        progress: Told of every tensor made.
        seed: Makes the weights repeatable, in the order in which they are asked for.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device_of: Callable[[str], torch.device],
        progress: Progress | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._device_of = device_of
        self._progress = progress
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._total_bytes = spec.num_parameters * self._dtype.itemsize
        self._made_bytes = 0
        # transformers asks from a pool of threads.
        self._lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[dict[str, RandomTensor]]:
        """Tensor name → a tensor that is made when it is indexed with `...`."""
        yield {tensor.name: RandomTensor(tensor, self) for tensor in self._spec.tensors}

    @property
    def dtype_name(self) -> str:
        """Element type of every tensor, by safetensors' name."""
        return SAFETENSORS_NAMES[self._spec.dtype]

    def make(self, tensor: TensorSpec) -> torch.Tensor:
        """The tensor, on its device."""
        with self._lock:
            device = self._device_of(tensor.name)
            values = torch.empty(tensor.shape, dtype=self._dtype, device=device)
            if tensor.role is Role.NORM:
                values.fill_(1.0)
            else:
                values.normal_(std=STANDARD_DEVIATION, generator=self._generator(device))
            self._made_bytes += values.nbytes
            if self._progress is not None:
                self._progress(self._made_bytes, self._total_bytes)
            return values

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device).manual_seed(self._seed)
        return self._generators[device]


class RandomTensor:
    """A tensor that is made when it is indexed, as safetensors' slices are read."""

    def __init__(self, tensor: TensorSpec, source: RandomTensors) -> None:
        self._tensor = tensor
        self._source = source

    def __getitem__(self, index: EllipsisType | slice | tuple[slice, ...]) -> torch.Tensor:
        return self._source.make(self._tensor)[index]

    def get_shape(self) -> list[int]:
        """Its shape, without making it."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Its element type, by safetensors' name."""
        return self._source.dtype_name
