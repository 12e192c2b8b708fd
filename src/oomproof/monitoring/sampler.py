"""Looks at an engine's memory after its steps, seldom enough to cost nothing, and tells of trouble.

A look is taken at most once a second, and never sooner than 400 times as long as the last one took
after it: looking costs at most a quarter of a percent of the time, on any machine.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

from oomproof.memory.terms import DeviceTerms
from oomproof.monitoring.events import MonitorEvent, OnEvent
from oomproof.monitoring.leaks import LeakDetector, LeakRule
from oomproof.monitoring.samples import AllocatorFacts, DeviceSample, Sample, read_allocator
from oomproof.monitoring.spikes import excesses
from oomproof.monitoring.status import MAX_EVENTS, status_of
from oomproof.monitoring.status_files import StatusFile, status_folder
from oomproof.planning.plan import Plan
from oomproof.units import format_bytes

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
REST_PER_WORK = 400
"""Time between looks over the time that one took."""
MAX_REST_S = 60.0
KEPT = 256
"""Samples in the ring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where facts come from; tests have their own."""

    monotonic: Callable[[], float] = time.perf_counter
    now: Callable[[], float] = time.time
    """Seconds since 1970."""
    allocator: Callable[[int], AllocatorFacts | None] = read_allocator
    rss_bytes: Callable[[], int] | None = None
    """None for this process's."""


class Sampler:
    """Watches one engine.

    Args:
        plan: What the engine was built from.
        measured: Device index → bytes measured so far.
        on_event: Told of each event, once.
        status_file: Where it is published; None for nowhere.
        rule: When growth counts as a leak.
        sources: Where facts come from.
    """

    def __init__(
        self,
        plan: Plan,
        measured: Callable[[], Mapping[int, DeviceTerms]],
        *,
        on_event: OnEvent | None = None,
        status_file: StatusFile | None = None,
        rule: LeakRule | None = None,
        sources: Sources | None = None,
    ) -> None:
        self.plan = plan
        self.samples: deque[Sample] = deque(maxlen=KEPT)
        """The last ones, oldest first."""
        self.events: deque[MonitorEvent] = deque(maxlen=MAX_EVENTS)
        """The last ones, oldest first; also those that are over."""
        self._rungs: Mapping[str, int] = {}
        self._measured, self._on_event, self._status_file = measured, on_event, status_file
        self._sources = sources or Sources()
        self._clock = self._sources.monotonic
        process = psutil.Process()
        self._rss: Callable[[], int] = self._sources.rss_bytes or (
            lambda: int(process.memory_info().rss)
        )
        self._rule = rule or LeakRule()
        self._leaks: dict[tuple[int | None, str], LeakDetector] = {}
        self._active: set[tuple[str, int | None, str]] = set()
        """Causes that were told and are not over."""
        self._steps = self._requests = self._peak_rss = 0
        self._requests_seen = -1
        self._due = float("-inf")
        self.sample()

    def after_step(self, finished_requests: int) -> None:
        """To be called after each step; looks where it is time to."""
        self._steps += 1
        self._requests += finished_requests
        if self._clock() >= self._due:
            self.sample()

    def sample(self) -> Sample:
        """Looks now."""
        started = self._clock()
        taken = self._take()
        self.samples.append(taken)
        self._peak_rss = max(self._peak_rss, taken.rss_bytes)
        self._find_spikes(taken)
        if taken.requests > self._requests_seen:
            self._requests_seen = taken.requests
            self._find_leaks(taken)
        self._publish(taken)
        ended = self._clock()
        rest = min(MAX_REST_S, REST_PER_WORK * (ended - started))
        self._due = ended + max(INTERVAL_S, rest)
        return taken

    def tell_rungs(self, counts: Mapping[str, int]) -> None:
        """Publishes by which rungs of the ladder the model came here; see Status."""
        self._rungs = dict(counts)
        self._publish(self.samples[-1])

    def close(self) -> None:
        """The engine is going: nothing is published of it any more."""
        if self._status_file is not None:
            self._status_file.remove()
            self._status_file = None

    def _take(self) -> Sample:
        measured = self._measured()
        return Sample(
            at=self._sources.now(),
            steps=self._steps,
            requests=self._requests,
            rss_bytes=self._rss(),
            devices=tuple(
                DeviceSample(
                    index=device.index,
                    measured=measured[device.index],
                    allocator=(
                        self._sources.allocator(device.index) if device.kind == "cuda" else None
                    ),
                )
                for device in self.plan.devices_in_use
                if device.index in measured
            ),
        )

    def _find_spikes(self, taken: Sample) -> None:
        now = set()
        for excess in excesses(self.plan, {one.index: one.measured for one in taken.devices}):
            event = MonitorEvent(
                kind="spike",
                at=taken.at,
                device=excess.device,
                term=excess.term,
                measured_bytes=excess.measured_bytes,
                planned_bytes=excess.planned_bytes,
                message=excess.message,
            )
            now.add(event.cause)
            self._tell(event)
        over = {cause for cause in self._active if cause[0] == "spike"} - now
        for cause in over:
            self._is_over(cause)

    def _find_leaks(self, taken: Sample) -> None:
        series: list[tuple[int | None, str, int]] = [(None, "rss", taken.rss_bytes)]
        series += [
            (device.index, "allocated", device.allocator.allocated_bytes)
            for device in taken.devices
            if device.allocator is not None
        ]
        for index, term, size in series:
            detector = self._leaks.setdefault((index, term), LeakDetector(self._rule))
            leak = detector.add(taken.requests, size)
            if leak is not None:
                where = "of the process" if index is None else f"on device {index}"
                what = "resident memory" if index is None else "tensors' memory"
                message = (
                    f"leak: {what} {where} grows by "
                    f"{format_bytes(round(leak.bytes_per_request))} a request (at least "
                    f"{format_bytes(round(leak.at_least))}), "
                    f"{format_bytes(round(leak.grown_bytes))} over "
                    f"{leak.requests:,.0f} requests"
                )
                self._tell(
                    MonitorEvent(
                        kind="leak",
                        at=taken.at,
                        device=index,
                        term=term,
                        measured_bytes=size,
                        bytes_per_request=leak.bytes_per_request,
                        message=message,
                    )
                )
            elif detector.leak is None and ("leak", index, term) in self._active:
                self._is_over(("leak", index, term))

    def _tell(self, event: MonitorEvent) -> None:
        if event.cause in self._active:
            return
        self._active.add(event.cause)
        self.events.append(event)
        log.warning("%s: %s", self.plan.model, event.message)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                # Somebody else's callback must not end a request.
                log.exception("on_event failed")

    def _is_over(self, cause: tuple[str, int | None, str]) -> None:
        self._active.discard(cause)
        kind, device, term = cause
        where = "" if device is None else f" of device {device}"
        log.info("%s: the %s of %s%s is over", self.plan.model, kind, term, where)

    def _publish(self, taken: Sample) -> None:
        file = self._status_file
        if file is None:
            return
        status = status_of(
            self.plan,
            taken,
            pid=file.pid,
            started_at=file.started_at,
            peak_rss_bytes=self._peak_rss,
            events=tuple(self.events),
            rungs=self._rungs,
        )
        try:
            file.write(status)
        except OSError as error:
            self._status_file = None
            log.warning(
                "`oomproof top` will not show this model: its status cannot be written (%s): "
                "set OOMPROOF_HOME",
                error,
            )


def open_status_file() -> StatusFile | None:
    """Where this process's next engine is published; None, and a line in the log, for no home."""
    try:
        return StatusFile(status_folder())
    except (RuntimeError, OSError, psutil.Error) as error:
        log.warning("`oomproof top` will not show this model: %s: set OOMPROOF_HOME", error)
        return None
