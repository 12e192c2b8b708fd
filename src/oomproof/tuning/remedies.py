"""What a fine-tuning lacks, and which option alone would make it fit. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from oomproof.memory.peft import Tuned
from oomproof.tuning.plan import TrainingPlan
from oomproof.units import format_bytes, round_up

Fits = Callable[[Tuned, int, int], bool]
"""(what is trained and how, sequences at once, tokens of each) → whether that fits."""


def remedies(
    fits: Fits,
    tuned: Tuned,
    longest: int,
    *,
    ways: Sequence[str],
    on_gpu: bool,
    format_name: str,
) -> tuple[str, ...]:
    """Options that would make one of the longest sequences fit, each alone.

    Args:
        fits: Whether a step does.
        tuned: What does not.
        longest: Tokens of the longest sequence.
        ways: Values of --checkpointing that the engine has, beside "layers".
        on_gpu: Whether there are optimizers in 8 bits.
        format_name: Of the frozen weights.
    """
    found = []
    length = round_up(max(1, longest // 2), 64)
    while length >= 64:
        if fits(tuned, 1, length):
            found.append(f"--context {_longest_that_fits(fits, tuned, longest)}")
            break
        length = length // 2 // 64 * 64
    others = [
        (f"--checkpointing {one}", replace(tuned, checkpointing=one))
        for one in ("layers", *(one for one in ways if one != "none"))
    ]
    if on_gpu:
        fewer = max(1, tuned.rank // 4)
        others += [
            ("--optimizer adamw-8bit", replace(tuned, optimizer="adamw-8bit")),
            ("--optimizer paged-adamw-8bit", replace(tuned, optimizer="paged-adamw-8bit")),
            (f"--rank {fewer}", replace(tuned, rank=fewer)),
            ("--no-packing", replace(tuned, packed=False)),
        ]
    found += [flag for flag, other in others if other != tuned and fits(other, 1, longest)]
    if format_name != "nf4-dq" and not found:
        found.append("--format nf4-dq")
    # Of several names of the same remedy the first.
    return tuple(dict.fromkeys(found)) or ("a smaller model, or a device with more memory",)


def _longest_that_fits(fits: Fits, tuned: Tuned, longest: int) -> int:
    low, high = 1, longest // 64
    while low < high:
        middle = (low + high + 1) // 2
        if fits(tuned, 1, middle * 64):
            low = middle
        else:
            high = middle - 1
    return low * 64


def describe_shortfall(plan: TrainingPlan) -> tuple[str, str]:
    """What does not fit, and what would help."""
    message = (
        f"one sequence of {plan.longest:,} tokens needs {format_bytes(plan.peak_bytes)}, "
        f"{plan.device} has {format_bytes(plan.usable_bytes)}: "
        f"{format_bytes(plan.shortfall_bytes)} missing"
    )
    return message, "use " + ", or ".join(plan.remedies)
