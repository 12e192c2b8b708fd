"""What the loader is asked for and what it answers; both ends of a load are compared here.

A target says where one tensor of a checkpoint goes. Every tensor must have exactly one target, and
every target its tensor, before a byte is read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from oomproof.errors import CheckpointError, LoadError
from oomproof.formats import DType
from oomproof.models.spec import CheckpointSpec, CheckpointTensor, ModelSpec, TensorSpec

LoadProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from the thread that loads."""

_FLOATS = frozenset(dtype for dtype in DType if dtype.value.startswith(("float", "bfloat")))
_SHOWN_NAMES = 3
_TICK_S = 0.05
"""Time between two calls of a progress callback."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where one tensor of the checkpoint goes."""

    name: str
    """Its name in the checkpoint."""
    shape: tuple[int, ...]
    """The model's shape; the checkpoint's must equal it."""
    device: torch.device
    """Device on which `store` wants its slices: the CPU or a CUDA device."""
    store: Callable[[torch.Tensor, int], None]
    """Converts a slice into the final place. Called in order of rows with (slice [rows, ...] on
    `device` in the source's dtype, index of its first row along dimension 0); a scalar comes as it
    is. It enqueues on the current CUDA stream, allocates nothing, and does not keep the slice."""
    finish: Callable[[], None] | None = None
    """Called once, after the last slice, on the same stream: double quantization."""
    place: torch.Tensor | None = None
    """The final tensor, contiguous, of `shape`: where its dtype is the source's, the bytes go
    straight there, on whatever device it is, and `store` is not called."""
    rows_multiple: int = 1
    """Slices begin at multiples of this many rows, so that 4-bit blocks are not cut."""
    dtype: torch.dtype | None = None
    """What the checkpoint must hold; None for any type of floating-point numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What was loaded, how fast, and with how much memory on the way."""

    bytes: int
    """Bytes of the tensors, in the source's dtype."""
    seconds: float
    tensors: int
    pinned_bytes: int
    """Page-locked host memory that the bytes travelled through; released by now."""
    device_staging_bytes: Mapping[torch.device, int]
    """Memory of each CUDA device that slices waited in for their conversion; released by now."""

    @property
    def bytes_per_s(self) -> float:
        """Mean speed, from the first call to the last synchronization."""
        return self.bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A target and the tensor that goes there."""

    target: Target
    dtype: torch.dtype
    """Of the source."""
    source: CheckpointTensor | None
    """Where its bytes lie; None where they are made up."""
    place: torch.Tensor | None
    """The final tensor, where bytes can go straight there."""
    device: torch.device
    """The device that the bytes travel to, with its index."""

    @property
    def is_empty(self) -> bool:
        """Whether it has no bytes, and so no slice."""
        return 0 in self.target.shape


class Ticker:
    """Tells of progress, at most 20 times a second, and once at the end."""

    def __init__(self, progress: LoadProgress | None, total_bytes: int) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._told_at = -_TICK_S

    def add(self, size_bytes: int) -> None:
        """Counts what was done."""
        self._done_bytes += size_bytes
        now = time.monotonic()
        if (
            self._progress is not None
            and now - self._told_at >= _TICK_S
            and self._done_bytes < self._total_bytes
        ):
            self._told_at = now
            self._progress(self._done_bytes, self._total_bytes)

    def finish(self) -> None:
        """Tells that everything is done."""
        if self._progress is not None:
            self._progress(self._total_bytes, self._total_bytes)


def is_computed_buffer(name: str) -> bool:
    """Whether it is a buffer that old checkpoints carry and models compute for themselves."""
    return name.endswith(".rotary_emb.inv_freq")


def pair_with_checkpoint(
    folder: Path,
    checkpoint: CheckpointSpec,
    targets: Sequence[Target],
    ignored: Callable[[str], bool],
) -> list[Pair]:
    """Every target with its tensor of the checkpoint, in the order of their bytes.

    Raises:
        LoadError: A tensor without a target, a target without a tensor or with a second target,
            another shape than the model's.
        CheckpointError: A tensor that does not hold floating-point numbers, or not what its target
            asks for.
    """
    by_name = _by_name(targets)
    sources = {tensor.name: tensor for tensor in checkpoint.tensors}
    unexpected = [name for name in sources if name not in by_name and not ignored(name)]
    _refuse(str(folder), by_name, {n: t.shape for n, t in sources.items()}, unexpected)
    wanted = [tensor for name, tensor in sources.items() if name in by_name]
    strange = [
        f"{t.name} ({t.dtype.value})"
        for t in wanted
        if by_name[t.name].dtype is None and t.dtype not in _FLOATS
    ]
    if strange:
        raise CheckpointError(
            str(folder),
            f"{len(strange)} parameters are not floating-point numbers: {_first(strange)}",
            remedy="use the checkpoint in 16 bits that it was quantized from",
        )
    for tensor in wanted:
        asked = by_name[tensor.name].dtype
        if asked is not None and getattr(torch, tensor.dtype.value) is not asked:
            raise CheckpointError(
                str(folder / tensor.file),
                f"tensor {tensor.name!r} holds {tensor.dtype}, not {asked}",
                remedy="config and weights do not belong together; download both again",
            )
    wanted.sort(key=lambda tensor: (tensor.file, tensor.offset_bytes))
    return [_pair(by_name[tensor.name], tensor.dtype, tensor) for tensor in wanted]


def pair_with_model(spec: ModelSpec, targets: Sequence[Target]) -> list[tuple[Pair, TensorSpec]]:
    """Every target with the model's tensor of that name, in the model's order.

    Raises:
        LoadError: As `pair_with_checkpoint`.
    """
    by_name = _by_name(targets)
    tensors = {tensor.name: tensor for tensor in spec.tensors}
    unexpected = [name for name in tensors if name not in by_name]
    _refuse(spec.id, by_name, {n: t.shape for n, t in tensors.items()}, unexpected)
    return [(_pair(by_name[name], spec.dtype), tensor) for name, tensor in tensors.items()]


def _pair(target: Target, stored: DType, source: CheckpointTensor | None = None) -> Pair:
    dtype: torch.dtype = getattr(torch, stored.value)
    place = target.place
    place = place.detach() if place is not None and place.dtype == dtype else None
    device = target.device if place is None else place.device
    if device == torch.device("cuda"):  # without an index it equals no device that has one
        device = torch.device("cuda", torch.cuda.current_device())
    return Pair(target=target, dtype=dtype, source=source, place=place, device=device)


def _by_name(targets: Sequence[Target]) -> dict[str, Target]:
    counts = Counter(target.name for target in targets)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise LoadError(
            f"{len(twice)} parameters have more than one target: {_first(twice)}",
            remedy="this is a bug in oomproof; report it",
        )
    for target in targets:
        place = target.place
        if place is not None and (place.shape != target.shape or not place.is_contiguous()):
            raise ValueError(
                f"the place of {target.name} is {tuple(place.shape)}, "
                f"it must be {target.shape} and contiguous"
            )
        if target.rows_multiple < 1:
            raise ValueError(f"rows_multiple of {target.name} is {target.rows_multiple}, below 1")
    return {target.name: target for target in targets}


def _refuse(
    location: str,
    targets: Mapping[str, Target],
    found: Mapping[str, tuple[int, ...]],
    unexpected: Sequence[str],
) -> None:
    misshaped = [
        f"{name} {list(found[name])} instead of {list(target.shape)}"
        for name, target in targets.items()
        if name in found and found[name] != tuple(target.shape)
    ]
    problems = {
        "missing": [name for name in targets if name not in found],
        "unexpected": unexpected,
        "mis-shaped": misshaped,
    }
    for what, names in problems.items():
        if names:
            raise LoadError(
                f"{location}: {len(names)} {what} parameters: {_first(sorted(names))}",
                remedy="the checkpoint does not belong to its config.json; download it again",
            )


def _first(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
