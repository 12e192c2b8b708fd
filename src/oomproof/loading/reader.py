"""Reads the tensors of a checkpoint, one at a time, straight to their devices.

Host memory is bounded: a tensor for a GPU passes through two page-locked buffers, whatever its
size, and a tensor for the CPU is read into its final place. Every float tensor is checked for NaN
and infinity on the device that received it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import BinaryIO

import torch

from oomproof.errors import CheckpointError
from oomproof.formats import DType
from oomproof.models.spec import CheckpointSpec, CheckpointTensor
from oomproof.units import MIB

STAGING_BUFFER_BYTES = 64 * MIB
"""Size of each of the two page-locked buffers."""
_CHECK_EVERY = 64
"""Tensors between two looks at the results of the finiteness checks."""

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in all)."""


class CheckpointReader:
    """Hands out a checkpoint's tensors on demand, each read once; callable from several threads.

    Args:
        folder: Where the shards are.
        checkpoint: Their headers.
        device_of: Tensor name → the device it goes to.
        progress: Told of every buffer read.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: CheckpointSpec,
        device_of: Callable[[str], torch.device],
        progress: Progress | None = None,
    ) -> None:
        self._folder = folder
        self._checkpoint = checkpoint
        self._device_of = device_of
        self._progress = progress
        self._files: dict[str, BinaryIO] = {}
        self._staging: _Staging | None = None
        self._total_bytes = sum(tensor.size_bytes for tensor in checkpoint.tensors)
        self._read_bytes = 0
        self._extremes: list[tuple[CheckpointTensor, torch.Tensor]] = []
        # transformers reads from a pool of threads; files and staging buffers serve one at a time.
        self._lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[dict[str, LazyTensor]]:
        """Tensor name → a tensor that is read when it is indexed with `...`.

        Raises:
            CheckpointError: A shard cannot be read, is shorter than its header says, or holds a
                value that is not finite.
        """
        try:
            yield {tensor.name: LazyTensor(tensor, self) for tensor in self._checkpoint.tensors}
            self._refuse_non_finite()
        finally:
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._staging = None

    def read(self, tensor: CheckpointTensor) -> torch.Tensor:
        """The tensor, on its device."""
        with self._lock:
            return self._read(tensor)

    def _read(self, tensor: CheckpointTensor) -> torch.Tensor:
        device = self._device_of(tensor.name)
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        result = torch.empty(tensor.shape, dtype=dtype, device=device)
        if tensor.size_bytes:
            self._fill(tensor, result.reshape(-1).view(torch.uint8))
            if dtype.is_floating_point and tensor.dtype.itemsize > 1:
                self._watch(tensor, result)
        return result

    def _fill(self, tensor: CheckpointTensor, target: torch.Tensor) -> None:
        """Reads the tensor's bytes into `target`, uint8 [size_bytes]."""
        file = self._file(tensor.file)
        file.seek(tensor.offset_bytes)
        if target.device.type == "cpu":
            for start in range(0, tensor.size_bytes, STAGING_BUFFER_BYTES):
                part = target[start : start + STAGING_BUFFER_BYTES]
                self._read_into(file, part, tensor)
            return
        if self._staging is None:
            self._staging = _Staging()
        for start in range(0, tensor.size_bytes, STAGING_BUFFER_BYTES):
            part = target[start : start + STAGING_BUFFER_BYTES]
            buffer = self._staging.acquire(part.numel())
            self._read_into(file, buffer, tensor)
            self._staging.send(buffer, part)

    def _read_into(self, file: BinaryIO, buffer: torch.Tensor, tensor: CheckpointTensor) -> None:
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        while view:
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(
                    str(self._folder / tensor.file),
                    f"ends inside tensor {tensor.name!r}",
                    remedy="the file changed since it was planned; download it again",
                )
            view = view[count:]
        self._read_bytes += buffer.numel()
        if self._progress is not None:
            self._progress(self._read_bytes, self._total_bytes)

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            path = self._folder / name
            try:
                self._files[name] = path.open("rb", buffering=0)
            except OSError as error:
                raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from None
        return self._files[name]

    def _watch(self, tensor: CheckpointTensor, values: torch.Tensor) -> None:
        # Minimum and maximum carry NaN and infinity along, and need no memory of the tensor's size.
        self._extremes.append((tensor, torch.stack(torch.aminmax(values))))
        if len(self._extremes) >= _CHECK_EVERY:
            self._refuse_non_finite()

    def _refuse_non_finite(self) -> None:
        for tensor, extremes in self._extremes:
            if not bool(torch.isfinite(extremes).all()):
                raise CheckpointError(
                    str(self._folder / tensor.file),
                    f"tensor {tensor.name!r} holds a value that is not finite",
                    remedy="the checkpoint is damaged; download it again",
                )
        self._extremes.clear()


class LazyTensor:
    """A tensor of a checkpoint that is read when it is indexed, as safetensors' slices are."""

    def __init__(self, tensor: CheckpointTensor, reader: CheckpointReader) -> None:
        self._tensor = tensor
        self._reader = reader

    def __getitem__(self, index: EllipsisType | slice | tuple[slice, ...]) -> torch.Tensor:
        return self._reader.read(self._tensor)[index]

    def get_shape(self) -> list[int]:
        """Its shape, without reading it."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Its element type, by safetensors' name."""
        return SAFETENSORS_NAMES[self._tensor.dtype]


SAFETENSORS_NAMES = {
    DType.FLOAT64: "F64",
    DType.FLOAT32: "F32",
    DType.BFLOAT16: "BF16",
    DType.FLOAT16: "F16",
    DType.FLOAT8_E4M3FN: "F8_E4M3",
    DType.FLOAT8_E5M2: "F8_E5M2",
    DType.INT64: "I64",
    DType.INT32: "I32",
    DType.INT16: "I16",
    DType.INT8: "I8",
    DType.UINT8: "U8",
    DType.BOOL: "BOOL",
}


class _Staging:
    """Two page-locked buffers that take turns: one is filled while the other travels."""

    def __init__(self) -> None:
        self._buffers = [
            torch.empty(STAGING_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def acquire(self, size_bytes: int) -> torch.Tensor:
        """A buffer [size_bytes] whose last journey is over."""
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        return self._buffers[self._turn][:size_bytes]

    def send(self, buffer: torch.Tensor, target: torch.Tensor) -> None:
        """Starts the copy of the acquired buffer to its place on a GPU."""
        target.copy_(buffer, non_blocking=True)
        with torch.cuda.device(target.device):
            event = torch.cuda.Event()
            event.record()
        self._events[self._turn] = event
        self._turn = 1 - self._turn
