"""The smallest listed hardware that a model would fit on, for each number of devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from oomproof.hardware.catalog import Accelerator, accelerators
from oomproof.hardware.spec import Hardware
from oomproof.planning.plan import Requirement
from oomproof.planning.search import Planner

COUNTS = (1, 2, 4, 8)
"""Equal devices in one machine."""


def what_it_would_take(planner: Planner, context: int, concurrency: int) -> tuple[Requirement, ...]:
    """For each format that is asked for and each count, the smallest accelerator that is enough.

    Only what an engine of this version runs counts, on NVIDIA GPUs: nothing else was measured.
    A GPU that shares the processor's memory stands alone in its machine. Limits of the machine that
    was asked about (--max-memory, --cap, --reserve) do not apply to another one.

    Args:
        planner: The model, the request, and the formats to try.
        context: Prompt and answer of one request, in tokens.
        concurrency: Requests at once.

    Returns:
        Format by format, best quality first, each with the fewest devices first.
    """
    smallest_first = sorted(
        accelerators(), key=lambda one: (one.free_bytes, -one.bandwidth_bytes_per_s, one.key)
    )
    found = []
    for name in planner.format_names():
        for count in COUNTS:
            for requirement in _enough(planner, smallest_first, name, count, context, concurrency):
                found.append(requirement)
                break
    return tuple(found)


def _enough(
    planner: Planner,
    smallest_first: list[Accelerator],
    format_name: str,
    count: int,
    context: int,
    concurrency: int,
) -> Iterator[Requirement]:
    """Accelerators that are enough, `count` of them, the smallest first."""
    least_bytes = planner.least_weights_bytes(format_name)
    for accelerator in smallest_first:
        if accelerator.free_bytes * count < least_bytes:
            continue
        if accelerator.kind != "cuda" or (accelerator.unified_memory and count > 1):
            continue
        devices = tuple(replace(accelerator.device(i), index=i) for i in range(count))
        machine = Hardware(devices=devices, host=planner.hardware.host, source="described")
        candidate = planner.on(machine).candidate(format_name, context, concurrency)
        if candidate.not_runnable is None and candidate.fits:
            yield Requirement(
                format=format_name,
                count=count,
                accelerator=accelerator.key,
                free_bytes=accelerator.free_bytes,
                context=context,
                concurrency=concurrency,
                tokens_per_second=candidate.tokens_per_second.decode,
            )
