"""What a running engine tells other processes of itself, and how strictly that is read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from oomproof.hardware.spec import DeviceKind
from oomproof.monitoring.events import Bytes, Count, Index, MonitorEvent, Text, Time
from oomproof.monitoring.samples import AllocatorFacts, Sample, Terms
from oomproof.monitoring.spikes import allowed_bytes
from oomproof.planning.plan import Plan

MAX_STATUS_BYTES = 256 * 1024
MAX_EVENTS = 16
"""Kept in a status, the newest."""
_MAX_DEVICES = 64
MAX_PID = 2**31 - 1
_MAX_SHOWN = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceStatus:
    """One device of a running plan."""

    index: Index
    """The plan's: CUDA's ordinal in that process."""
    name: Text
    kind: DeviceKind
    uuid: Text | None
    planned: Terms
    allowed_bytes: Bytes
    """The most that the measured terms may sum up to; on a processor, with the process itself."""
    measured: Terms
    """High-water marks."""
    allocator: AllocatorFacts | None

    @property
    def is_within_plan(self) -> bool:
        """Whether its sum is."""
        return self.measured.peak_bytes <= self.allowed_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """A running engine."""

    schema: Literal[1] = 1
    pid: Annotated[int, Field(ge=1, le=MAX_PID)]
    started_at: Time
    """Of the process: another one of the same number has another."""
    written_at: Time
    model: Text
    format: Text
    engine: Text
    context: Count
    """Tokens."""
    concurrency: Count
    steps: Count
    requests: Count
    """That ended."""
    rss_bytes: Bytes
    peak_rss_bytes: Bytes
    """The highest that was sampled."""
    planned_host_bytes: Bytes
    devices: Annotated[tuple[DeviceStatus, ...], Field(max_length=_MAX_DEVICES)]
    events: Annotated[tuple[MonitorEvent, ...], Field(max_length=MAX_EVENTS)] = ()
    rungs: Annotated[dict[Text, Count], Field(max_length=_MAX_DEVICES)] = field(
        default_factory=dict
    )
    """Rungs of the ladder that it came here by, and how often each was taken."""

    def to_json(self) -> bytes:
        """For the status file."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self)
        for device, values in zip(self.devices, plain["devices"], strict=True):
            values["measured_peak_bytes"] = device.measured.peak_bytes
            values["is_within_plan"] = device.is_within_plan
            if device.allocator is not None:
                values["allocator"] = device.allocator.as_dict()
        return plain


def status_of(
    plan: Plan,
    sample: Sample,
    *,
    pid: int,
    started_at: float,
    peak_rss_bytes: int,
    events: tuple[MonitorEvent, ...],
    rungs: Mapping[str, int] | None = None,
) -> Status:
    """What is told of an engine after a sample."""
    samples = {device.index: device for device in sample.devices}
    return Status(
        pid=pid,
        started_at=started_at,
        written_at=sample.at,
        model=plan.model[:_MAX_SHOWN],
        format=plan.format,
        engine=plan.engine,
        context=plan.context,
        concurrency=plan.concurrency,
        steps=sample.steps,
        requests=sample.requests,
        rss_bytes=sample.rss_bytes,
        peak_rss_bytes=peak_rss_bytes,
        planned_host_bytes=plan.host.peak_bytes,
        devices=tuple(
            DeviceStatus(
                index=device.index,
                name=device.name[:_MAX_SHOWN],
                kind=device.kind,
                uuid=device.uuid,
                planned=device.terms,
                allowed_bytes=allowed_bytes(plan, device),
                measured=samples[device.index].measured,
                allocator=samples[device.index].allocator,
            )
            for device in plan.devices_in_use[:_MAX_DEVICES]
            if device.index in samples
        ),
        events=events[-MAX_EVENTS:],
        rungs=dict(rungs or {}),
    )


def parse_status(data: bytes) -> Status:
    """Reads what another process wrote.

    Raises:
        ValueError: It is no status of this schema; the first wrong field is named.
    """
    if len(data) > MAX_STATUS_BYTES:
        raise ValueError(f"larger than {MAX_STATUS_BYTES:,} bytes")
    try:
        return _READER.validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise ValueError(f"{where[:_MAX_SHOWN]}: {first['msg'][:_MAX_SHOWN]}") from None


_READER = TypeAdapter(Status)
