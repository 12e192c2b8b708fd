"""What happens to memory in benchmarks/faults.py: limits that shrink, processes that take it.

On a GPU it happens: torch's own limit is lowered and its allocator asked for more, another process
takes what is free. Without a GPU the same calls make it up, so that every row runs anywhere.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from oomproof.engine.messages import Event, Request
from oomproof.engine.protocol import Engine
from oomproof.guarding.machine import Machine, measure
from oomproof.guarding.situation import needed_bytes
from oomproof.hardware.holders import Holder
from oomproof.hardware.spec import Hardware
from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import Plan
from oomproof.units import GIB, MIB

SLOWNESS = 10
"""Waits of the ladder are so many times shorter here; what is waited for is quick."""
_ASKED_BYTES = 256 * MIB
_THIEF_S = 120

_THIEF = """
import sys, torch
size, left, seconds = (float(word) for word in sys.argv[1:])
free = torch.cuda.mem_get_info()[0]
taken = int(size if size else free - left)
held = torch.empty(max(0, taken), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print(held.numel(), flush=True)
import select
select.select([sys.stdin], [], [], seconds)
"""


class World(Protocol):
    """One GPU, or what stands for it."""

    machine: Machine

    def before_start(self, plan: Plan) -> None:
        """Called before each engine is started."""

    def run_out(self, plan: Plan, less_bytes: int) -> None:
        """Raises what the allocator raises; so much less is allowed from here on, 0 for as much."""

    def lift(self) -> None:
        """Takes every limit back."""

    def thief(self, *, size: int = 0, left: int = 0, seconds: float = 0.0) -> Any:
        """Another process that takes memory while the block lasts, or for so many seconds."""

    def used_bytes(self) -> int:
        """What is used of the device, by whomever."""


class GpuWorld:
    """GPU 0."""

    def __init__(self) -> None:
        self.machine = Machine(sleep=lambda seconds: time.sleep(seconds / SLOWNESS))

    def before_start(self, plan: Plan) -> None:
        """Real limits need no help."""

    def run_out(self, plan: Plan, less_bytes: int) -> None:  # noqa: ARG002 - the GPU knows
        """Lowers torch's limit and asks for more."""
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        limit = torch.cuda.memory_reserved(0) - less_bytes
        torch.cuda.set_per_process_memory_fraction(max(0.0, limit / total), 0)
        try:
            # Idle pieces of the allocator must not satisfy it.
            held = [torch.empty(_ASKED_BYTES, dtype=torch.uint8, device="cuda") for _ in range(64)]
            raise AssertionError(f"{len(held)} allocations passed a limit of {limit} bytes")
        finally:
            if not less_bytes:
                self.lift()

    def lift(self) -> None:
        """Lets torch have all of it."""
        import torch

        torch.cuda.set_per_process_memory_fraction(1.0, 0)

    @contextmanager
    def thief(self, *, size: int = 0, left: int = 0, seconds: float = 0.0) -> Iterator[int]:
        """A process of its own, which ends with its stdin and so with this one."""
        thief = subprocess.Popen(
            [sys.executable, "-c", _THIEF, str(size), str(left), str(seconds or _THIEF_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert thief.stdout is not None
        try:
            yield int(thief.stdout.readline() or 0)
        finally:
            thief.kill()
            thief.communicate()

    def used_bytes(self) -> int:
        """By the driver, all processes together."""
        from oomproof.hardware.usage import watch_gpus

        with watch_gpus() as read:
            return read()[0].used_bytes


class MadeUpWorld:
    """A processor whose memory runs out as told."""

    def __init__(self) -> None:
        self._bound: int | None = None
        self._taken = 0
        self._slept_s, self._back_s = 0.0, float("inf")
        self.machine = Machine(
            measure=self._measure,
            holders=lambda _plan: (
                (Holder(device=0, pid=None, name="?", used_bytes=self._taken),)
                if self._taken
                else ()
            ),
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds / SLOWNESS)
        self._slept_s += seconds / SLOWNESS

    def _measure(self, plan: Plan) -> Hardware:
        hardware = measure(plan)
        # By what was slept, not by the clock: a busy machine must not bring it back by itself.
        if self._slept_s >= self._back_s:
            self._taken = 0
        devices = tuple(
            replace(one, free_bytes=max(0, one.free_bytes - self._taken))
            for one in hardware.devices
        )
        return replace(hardware, devices=devices)

    def before_start(self, plan: Plan) -> None:
        """Refuses a plan above the limit."""
        needed = sum(needed_bytes(plan, device) for device in plan.devices_in_use)
        if self._bound is not None and needed > self._bound:
            raise _made_up(needed - self._bound)

    def run_out(self, plan: Plan, less_bytes: int) -> None:
        """Raises; less is allowed from here on."""
        if less_bytes:
            needed = sum(needed_bytes(plan, device) for device in plan.devices_in_use)
            self._bound = needed - less_bytes
        raise _made_up(max(1, less_bytes))

    def lift(self) -> None:
        """Forgets the limit."""
        self._bound = None

    @contextmanager
    def thief(self, *, size: int = 0, left: int = 0, seconds: float = 0.0) -> Iterator[int]:
        """Takes it from what is measured."""
        free = measure_free(self)
        self._taken += size or max(0, free - left)
        self._back_s = self._slept_s + seconds if seconds else float("inf")
        try:
            yield self._taken
        finally:
            self._taken = 0

    def used_bytes(self) -> int:
        """Nothing here is a device's."""
        return 0


def measure_free(world: World) -> int:
    """Free bytes of the first device, without the taken ones."""
    from oomproof.hardware.probe import probe

    return probe().devices[0].free_bytes if isinstance(world, GpuWorld) else 64 * GIB


def _made_up(missing: int) -> Exception:
    import torch

    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {missing / MIB:.2f} MiB. GPU 0 has a total "
        "capacity of 23.64 GiB of which 0 bytes is free."
    )


class Troubled:
    """An engine in whose steps memory runs out, at numbers that are counted over all engines.

    Args:
        engine: Runs.
        plan: What it runs.
        world: Whose memory it is.
        steps: Number of the step → bytes less from then on.
        count: Steps so far, of the engines before it too.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        world: World,
        steps: Mapping[int, int],
        count: list[int],
    ) -> None:
        self.engine, self._plan, self._world = engine, plan, world
        self._steps, self._count = steps, count

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.engine.idle

    def submit(self, request: Request) -> None:
        """Queues a request."""
        self.engine.submit(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request."""
        self.engine.cancel(request_id)

    def step(self) -> Sequence[Event]:
        """A step, or no memory for it."""
        self._count[0] += 1
        if (less := self._steps.get(self._count[0])) is not None:
            self._world.run_out(self._plan, less)
        return self.engine.step()

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        """As the engine."""
        return self.engine.measured_terms()

    def close(self) -> None:
        """Gives the memory back."""
        self.engine.close()
