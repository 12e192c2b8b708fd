"""Several processes that train one model, a GPU each: who they are, and what they exchange.

A launcher starts them and says which is which in the environment: torchrun, accelerate launch or
any other that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. All ranks run the
same passes in the same order: in each they meet. Where one does not come, the others fail by the
group's timeout at the latest, with a RankError, or ended by NCCL's own watchdog; launchers end all
when the first one ends, and name it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, Literal

import torch
import torch.distributed as dist

from oomproof.errors import HardwareError, InputError, NotRunnableError, RankError

TIMEOUT_S = 600.0
"""Longer than what a rank may do alone between two meetings: write a checkpoint, read its data."""
_DIGEST_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The processes of a run, as one of them sees them; by default the only one."""

    rank: int = 0
    """Of this process, from 0."""
    size: int = 1
    local_rank: int = 0
    """Of this process among those of its machine: the index of its GPU."""
    group: dist.ProcessGroup | None = None
    """None for torch's default group, and where there is one process."""
    talk: dist.ProcessGroup | None = None
    """What words travel through, over the processor and with patience; None for `group`."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def device(self, kind: Literal["cuda", "cpu"]) -> torch.device:
        """Where this process computes."""
        return torch.device("cpu") if kind == "cpu" else torch.device("cuda", self.local_rank)

    def sum(self, tensor: torch.Tensor) -> Exchange:
        """Begins to add up a tensor over all ranks, in its place."""
        with _explained("adding up gradients"):
            return Exchange(
                dist.all_reduce(tensor, group=self.group, async_op=True), "adding up gradients"
            )

    def gather(self, into: torch.Tensor, part: torch.Tensor) -> Exchange:
        """Begins to bring the parts of all ranks together, in their order.

        Args:
            into: As many numbers as all parts.
            part: This rank's.
        """
        # Its name before torch 2.13, where that is deprecated.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with _explained("gathering a layer"):
            work = gather(into, part, group=self.group, async_op=True)
            return Exchange(work, "gathering a layer")

    def trade(self, into: torch.Tensor, parts: torch.Tensor) -> None:
        """Sends part i of a tensor to rank i, and takes the part that each has for this one."""
        with _explained("handing out layers"):
            dist.all_to_all_single(into, parts, group=self.group)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Gives all ranks the first one's values."""
        with _explained("comparing adapters"):
            first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            dist.broadcast(tensor, first, group=self.group)

    def agree(self, facts: Mapping[str, object], device: torch.device) -> None:
        """Checks that all ranks say the same, by digests of what they print as.

        Args:
            facts: What → value: "seed" → 0.
            device: That the group's backend talks of.

        Raises:
            InputError: They do not.
        """
        if self.size == 1:
            return
        digests = [
            sha256(repr(value).encode()).digest()[:_DIGEST_BYTES] for value in facts.values()
        ]
        own = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).to(device)
        found = own.new_empty(self.size * own.numel())
        self.gather(found, own).wait()
        rows = found.view(self.size, len(facts), _DIGEST_BYTES).cpu()
        for rank, row in enumerate(rows):
            for number, (name, value) in enumerate(facts.items()):
                if not torch.equal(row[number], rows[0, number]):
                    raise InputError(
                        f"rank {rank} has another {name} than rank 0; "
                        f"rank {self.rank} has {str(value)[:120]}",
                        remedy="start all ranks with the same options",
                    )

    def all_true(self, holds: torch.Tensor) -> bool:
        """Whether a truth [] holds on every rank."""
        if self.size == 1:
            return bool(holds)
        count = holds.to(torch.int32)
        self.sum(count).wait()
        return int(count) == self.size

    def share(self, value: Any = None) -> Any:
        """The first one's value, on all of them; it can be pickled."""
        if self.size == 1:
            return value
        box, group = [value], self._words
        with _explained("waiting for the first rank"):
            first = 0 if group is None else dist.get_global_rank(group, 0)
            dist.broadcast_object_list(box, first, group=group)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Everybody's value, in the ranks' order; they can be pickled."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            with _explained("hearing of the others"):
                dist.all_gather_object(found, value, group=self._words)
        return found

    def meet(self) -> None:
        """Waits until all are here."""
        self.collect(None)

    def any_of(self, holds: bool) -> bool:
        """Whether something holds on one rank at least."""
        return any(self.collect(holds))

    @property
    def _words(self) -> dist.ProcessGroup | None:
        return self.group if self.talk is None else self.talk


ALONE = Ranks()
"""One process: nothing is exchanged."""


class Exchange:
    """Something that is on its way between ranks."""

    __slots__ = ("_what", "_work")

    def __init__(self, work: Any, what: str) -> None:
        self._work, self._what = work, what

    def wait(self) -> None:
        """Lets what is launched next come after it; on the CPU, waits.

        Raises:
            RankError: Another rank failed, or did not come in time.
        """
        with _explained(self._what):
            self._work.wait()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Gloo raises plain ones; others are the device's own, and somebody else's to explain.
        if not isinstance(error, dist.DistError) and type(error) is not RuntimeError:
            raise
        first = str(error).strip().partition("\n")[0]
        raise RankError(
            f"another rank is gone, or does not answer, {what}: {first[:200]}",
            remedy="see what the rank that ended first has written",
        ) from error


def current() -> Ranks:
    """Of torch's default process group, whoever made it; ALONE where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    rank = dist.get_rank()
    return Ranks(
        rank=rank,
        size=dist.get_world_size(),
        local_rank=_number("LOCAL_RANK", os.environ.get("LOCAL_RANK", str(rank))),
    )


def from_environment(
    kind: Literal["cuda", "cpu"] = "cuda", *, timeout_s: float = TIMEOUT_S
) -> Ranks:
    """Joins the processes that a launcher has started; ALONE where it is one, or none did.

    Afterwards the process's CUDA device is that of its local rank. A process group that is there
    already, accelerate's for example, is taken as it is.

    Args:
        kind: Where models compute: NCCL for GPUs, gloo for processors.
        timeout_s: Of each meeting.

    Raises:
        InputError: The environment says half of what is needed, or no numbers.
        HardwareError: More processes on this machine than GPUs.
        NotRunnableError: This torch does not talk between processes.
        RankError: Others did not come in time.
    """
    if dist.is_available() and dist.is_initialized():
        return current()
    size = _number("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if size <= 1:
        return ALONE
    missing = [
        name
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {size}, and {', '.join(missing)} is not set",
            remedy="start with torchrun --nproc-per-node GPUS, or accelerate launch",
        )
    rank = _number("RANK", os.environ["RANK"])
    local_rank = _number("LOCAL_RANK", os.environ["LOCAL_RANK"])
    if not 0 <= rank < size or local_rank < 0:
        raise InputError(f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank}: no such rank")
    _check_backend(kind)
    if kind == "cuda":
        _take_gpu(local_rank)
    ranks = Ranks(rank=rank, size=size, local_rank=local_rank)
    with _explained("meeting for the first time"):
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
            # NCCL's buffers are there from now on, and not from somewhere in the first step.
            device_id=ranks.device(kind) if kind == "cuda" else None,
        )
    return ranks


def leave(ranks: Ranks) -> None:
    """Ends what `from_environment` began, when all is done; after a failure ranks just end."""
    if ranks.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def _take_gpu(local_rank: int) -> None:
    # Where the launcher says so, all ranks of the machine see at once that there are too few.
    here = max(local_rank + 1, _number("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    found = torch.cuda.device_count()
    if here > found:
        raise HardwareError(
            f"{here} processes on this machine, and {found} GPUs are visible",
            remedy=f"start at most {found}: torchrun --nproc-per-node {max(1, found)}",
        )
    torch.cuda.set_device(local_rank)


def _check_backend(kind: str) -> None:
    name = "NCCL" if kind == "cuda" else "gloo"
    there = dist.is_available() and (
        dist.is_nccl_available() if kind == "cuda" else dist.is_gloo_available()
    )
    if not there:
        raise NotRunnableError(
            f"this torch {torch.__version__} has no {name}, which processes talk through",
            remedy="install torch for CUDA on Linux, or train in one process",
        )


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise InputError(f"{name} is {value[:40]!r}, not a whole number")
    return int(value)
