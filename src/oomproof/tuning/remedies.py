"""What a fine-tuning lacks, and which option alone would make it fit. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from oomproof.memory.peft import Tuned
from oomproof.tuning.plan import TrainingPlan
from oomproof.units import format_bytes, round_up

Fits = Callable[[Tuned, int, int], bool]
"""(what is trained and how, sequences at once, tokens of each) → whether that fits."""


def remedies(  # noqa: PLR0913 - everything that an option may change
    fits: Fits,
    tuned: Tuned,
    longest: int,
    *,
    micro_batch: int,
    fewer: int,
    ways: Sequence[str],
    on_gpu: bool,
    truncates: bool,
    longest_sample: int,
    others: Mapping[str, Callable[[], bool]],
    otherwise: str,
) -> tuple[str, ...]:
    """Options that would make the longest sequences fit, each alone.

    Args:
        fits: Whether a step does.
        tuned: What does not.
        longest: Tokens of the longest sequence.
        micro_batch: Sequences that have to fit at once.
        fewer: Of these, as many as do; 0 for none.
        ways: Values of --checkpointing that the engine has, beside "layers".
        on_gpu: Whether there are optimizers in 8 bits.
        truncates: Whether samples longer than a sequence are refused unless that is asked for.
        longest_sample: Tokens of the longest.
        others: Options that nothing else stands in for → whether they would do.
        otherwise: What is told where no option does.
    """
    found = []
    if fewer:
        found.append(f"--micro-batch {fewer}")
    length = round_up(max(1, longest // 2), 64)
    while length >= 64:
        if fits(tuned, micro_batch, length):
            context = _longest_that_fits(fits, tuned, micro_batch, longest)
            cuts = truncates and longest_sample > context
            found.append(f"--context {context}" + " --long-samples truncate" * cuts)
            break
        length = length // 2 // 64 * 64
    changes = [
        (f"--checkpointing {one}", replace(tuned, checkpointing=one))
        for one in ("layers", *(one for one in ways if one != "none"))
    ]
    if on_gpu:
        smaller = max(1, tuned.rank // 4)
        changes += [
            ("--optimizer adamw-8bit", replace(tuned, optimizer="adamw-8bit")),
            ("--optimizer paged-adamw-8bit", replace(tuned, optimizer="paged-adamw-8bit")),
            (f"--rank {smaller}", replace(tuned, rank=smaller)),
            ("--no-packing", replace(tuned, packed=False)),
        ]
    found += [flag for flag, one in changes if one != tuned and fits(one, micro_batch, longest)]
    if not found:
        found += [flag for flag, would in others.items() if would()]
    # Of several names of the same remedy the first.
    return tuple(dict.fromkeys(found)) or (otherwise,)


def _longest_that_fits(fits: Fits, tuned: Tuned, micro_batch: int, longest: int) -> int:
    low, high = 1, longest // 64
    while low < high:
        middle = (low + high + 1) // 2
        if fits(tuned, micro_batch, middle * 64):
            low = middle
        else:
            high = middle - 1
    return low * 64


def describe_shortfall(plan: TrainingPlan) -> tuple[str, str]:
    """What does not fit, and what would help."""
    needed, place, has = plan.peak_bytes, plan.device, plan.usable_bytes
    if plan.lacks_host_memory:
        host = plan.base.host
        needed, place = host.peak_bytes + plan.ranks * plan.host_bytes, "host memory"
        has = host.usable_bytes or 0
    rows = f"{plan.micro_batch:,} sequences of {plan.longest:,} tokens at once need"
    if plan.micro_batch == 1:
        rows = f"one sequence of {plan.longest:,} tokens needs"
    message = (
        f"{rows} {format_bytes(needed)}, {place} has {format_bytes(has)}: "
        f"{format_bytes(plan.shortfall_bytes)} missing"
    )
    return message, "use " + ", or ".join(plan.remedies)
