"""Made-up weights at a model's true shapes, made slice by slice on the devices they are for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from hashlib import blake2b
from itertools import zip_longest

import torch

from oomproof.formats import ceil_div
from oomproof.loading.lanes import place_of
from oomproof.loading.random_tensors import STANDARD_DEVIATION
from oomproof.loading.slices import DEFAULT_LIMITS, Limits, Slice, cut_slices
from oomproof.loading.targets import LoadProgress, LoadReport, Target, Ticker, pair_with_model
from oomproof.models.spec import ModelSpec, Role, TensorSpec
from oomproof.units import MIB

_BLOCK = 4 * MIB
"""Values that come from one seed."""

Made = tuple[Slice, TensorSpec]
"""A slice, and the tensor that it is of."""


def load_random(
    spec: ModelSpec,
    targets: Sequence[Target],
    *,
    progress: LoadProgress | None = None,
    seed: int = 0,
    limits: Limits = DEFAULT_LIMITS,
) -> LoadReport:
    """As `load_checkpoint`, with weights that no file has: normally distributed, norms 1.

    They have the checkpoint's dtype, and take the same way through `store` and `finish`. They are
    the same for the same seed, names and shapes, on the same kind of device, however they are cut.

    Raises:
        LoadError: The targets are not the model's tensors.
    """
    begin_s = time.perf_counter()
    pairs = pair_with_model(spec, targets)
    work = [
        (one, tensor)
        for number, (pair, tensor) in enumerate(pairs)
        for one in cut_slices(pair, number, limits)
    ]
    total_bytes = sum(one.size_bytes for one, _ in work)
    ticker = Ticker(progress, total_bytes)
    with torch.no_grad(), ExitStack() as stack:
        makers: dict[torch.device, _Maker] = {}
        for device in dict.fromkeys(one.pair.device for one, _ in work):
            slices = [one for one, _ in work if one.pair.device == device]
            makers[device] = _Maker(device, slices, seed=seed)
            stack.callback(makers[device].close)
        for one, tensor in in_turn(work):
            makers[one.pair.device].make(one, tensor)
            ticker.add(one.size_bytes)
        for pair, _ in pairs:
            if pair.is_empty and pair.target.finish is not None:
                pair.target.finish()
        staging = {d: m.staging_bytes for d, m in makers.items() if d.type == "cuda"}
    if staging:
        torch.cuda.empty_cache()
    ticker.finish()
    return LoadReport(
        bytes=total_bytes,
        seconds=time.perf_counter() - begin_s,
        tensors=len(pairs),
        pinned_bytes=0,
        device_staging_bytes=staging,
    )


def in_turn(work: Sequence[Made]) -> Iterator[Made]:
    """Slices of all devices in turn, each device's in their order: so the devices work at once."""
    queues: dict[torch.device, list[Made]] = {}
    for made in work:
        queues.setdefault(made[0].pair.device, []).append(made)
    for turn in zip_longest(*queues.values()):
        yield from (made for made in turn if made is not None)


class _Maker:
    """Makes slices on one device, on the caller's stream.

    Args:
        device: With its index.
        slices: All that it will be asked for.
        seed: Of the whole model.
    """

    def __init__(self, device: torch.device, slices: Sequence[Slice], *, seed: int) -> None:
        self._device = device
        staged = [one.size_bytes for one in slices if one.pair.place is None]
        self._staging = torch.empty(max(staged, default=0), dtype=torch.uint8, device=device)
        dtype = slices[0].pair.dtype
        largest = max((one.begin_bytes + one.size_bytes) // dtype.itemsize for one in slices)
        self._noise = Noise(device, dtype, seed=seed, largest=largest)
        self.staging_bytes = self._staging.nbytes + self._noise.scratch.nbytes

    def make(self, one: Slice, tensor: TensorSpec) -> None:
        """Makes a slice and hands it to its target."""
        pair, target = one.pair, one.pair.target
        region = self._staging[: one.size_bytes] if pair.place is None else place_of(one)
        values = region.view(pair.dtype)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            if tensor.role is Role.NORM:
                values.fill_(1.0)
            else:
                begin = one.begin_bytes // pair.dtype.itemsize
                self._noise.fill(values, tensor.name, begin=begin, numel=tensor.numel)
            if pair.place is None:
                target.store(values.view(one.shape), one.first_row)
            if one.is_last and target.finish is not None:
                target.finish()

    def close(self) -> None:
        """Waits for the device and gives the staging memory back."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for memory in (self._staging, self._noise.scratch):
            memory.untyped_storage().resize_(0)


class Noise:
    """Normally distributed values, repeatable for a seed, a tensor's name and a kind of device.

    A tensor is a sequence of blocks, each from a seed of its own. Where a slice cuts a block, the
    whole block is made beside it.

    Args:
        device: Where values are made.
        dtype: Their type.
        seed: Any whole number.
        largest: Elements of the largest tensor.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, seed: int, largest: int
    ) -> None:
        self._seed = seed
        self._generator = torch.Generator(device=device)
        self.scratch = torch.empty(min(_BLOCK, largest), dtype=dtype, device=device)

    def fill(self, out: torch.Tensor, name: str, *, begin: int, numel: int) -> None:
        """Makes the values of part of a tensor.

        Args:
            out: Where to, [values], contiguous.
            name: The tensor's.
            begin: Index of the part's first value in the flattened tensor.
            numel: Values of the whole tensor.
        """
        end = begin + out.numel()
        for index, first, last in _blocks(begin, end, numel):
            self._generator.manual_seed(self._seed_of(name, index))
            left, right = max(first, begin), min(last, end)
            part = out[left - begin : right - begin]
            if right - left == last - first:
                part.normal_(std=STANDARD_DEVIATION, generator=self._generator)
            else:
                block = self.scratch[: last - first]
                block.normal_(std=STANDARD_DEVIATION, generator=self._generator)
                part.copy_(block[left - first : right - first])

    def _seed_of(self, name: str, index: int) -> int:
        digest = blake2b(f"{self._seed}:{index}:{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def _blocks(begin: int, end: int, numel: int) -> Iterator[tuple[int, int, int]]:
    """(index, first value, end) of each block that has values of the range."""
    for index in range(begin // _BLOCK, ceil_div(end, _BLOCK)):
        yield index, index * _BLOCK, min((index + 1) * _BLOCK, numel)
