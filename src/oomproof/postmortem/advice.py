"""The command that would have worked, from a plan for the GPU that a log speaks of."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from oomproof.errors import HardwareError, InputError
from oomproof.faults.fault import Fault
from oomproof.hardware.catalog import Accelerator, lookup, match
from oomproof.hardware.describe import describe
from oomproof.models.catalog import find
from oomproof.models.resolve import BUNDLED, resolve
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.postmortem.scan import Reading
from oomproof.units import GIB, MIB

_MODEL = "MODEL"
_GPUS = "YOUR GPUS"
_MAC = "YOUR MAC"
_MIN_TOTAL_BYTES = 256 * MIB
_MIN_OTHERS_BYTES = GIB
_MAX_GPUS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What to run."""

    model: str | None
    """The model that the log names, None where it names none."""
    gpus: str | None
    """Its GPUs, as --gpus takes them; None where it does not say."""
    plan: Plan | None
    """Of that model on those GPUs, where both are known without a network."""
    others_bytes: int | None = None
    """What other processes held of the GPU; `gpus` and `plan` are about the rest of it."""
    alone: Plan | None = None
    """The plan for the whole GPU, where others held a part."""
    commands: tuple[str, ...]
    """The first is the one that would have worked, once others have gone where only `alone` fits;
    with words in capitals where something is not known."""


def advise(reading: Reading) -> Advice:
    """Plans what a log speaks of.

    Args:
        reading: A log with a first failure that is one of memory.
    """
    assert reading.first is not None
    others_bytes = _others(reading.first)
    gpus = _gpus(reading, reading.first, others_bytes or 0)
    model, is_known = _model(reading.models)
    engine = "transformers" if reading.hip else "auto"
    plan = alone = None
    if is_known and model is not None and gpus is not None:
        plan = _plan(model, gpus, engine)
        whole = _gpus(reading, reading.first, 0)
        if whole is not None and whole != gpus:
            alone = _plan(model, whole, engine)
    advice = Advice(
        model=model,
        gpus=gpus,
        plan=plan,
        others_bytes=others_bytes,
        alone=alone,
        commands=(),
    )
    return replace(advice, commands=_commands(advice, engine, is_apple=_is_apple(reading)))


def _commands(advice: Advice, engine: str, *, is_apple: bool) -> tuple[str, ...]:
    name = _MODEL if advice.model is None else shlex.quote(advice.model)
    if is_apple:
        return (f'oomproof plan {name} --for mlx --gpus "{_MAC}"',)
    by_engine = "" if engine == "auto" else f" --engine {engine}"
    look = f'oomproof plan {name} --gpus "{advice.gpus or _GPUS}"{by_engine}'
    if advice.plan is None:
        return (look,)
    for plan in (advice.plan, advice.alone):
        if plan is not None and plan.fits and plan.runnable and plan.refused is None:
            options = f"--format {plan.format} --context {plan.context}{by_engine}"
            return (f'oomproof run {name} "PROMPT" {options}', look)
    return (f"{look} --what-would-it-take", f"{look} --offload cpu")


def _plan(model: str, gpus: str, engine: str) -> Plan | None:
    """The best format at the usual context; at the largest that fits, where that does not."""
    try:
        spec, hardware = resolve(model), describe(gpus)
        plan = make_plan(spec, hardware, PlanRequest(engine=engine))
        if not plan.fits:
            shorter = make_plan(spec, hardware, PlanRequest(engine=engine, context="auto"))
            plan = shorter if shorter.fits else plan
    except InputError:  # a folder that is no model, or a model that cannot be planned
        return None
    return plan


def _model(names: tuple[str, ...]) -> tuple[str | None, bool]:
    """The model that is meant, and whether it can be planned without a network."""
    for name in names:
        if name == BUNDLED or find(name) is not None or _is_folder(name):
            return name, True
    return next((name for name in names if not name.startswith("-")), None), False


def _is_folder(name: str) -> bool:
    try:
        return (Path(name).expanduser() / "config.json").is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def _others(fault: Fault) -> int | None:
    """What processes that the message lists held, where it is more than a desktop does."""
    held, total = fault.figures.other_bytes, fault.figures.total_bytes
    if held is None or total is None or held < _MIN_OTHERS_BYTES:
        return None
    return held


def _gpus(reading: Reading, fault: Fault, others_bytes: int) -> str | None:
    """The GPUs of the log by name, else by their memory; None where it says neither."""
    total = fault.figures.total_bytes
    if total is not None:
        total = total - others_bytes if total - others_bytes >= _MIN_TOTAL_BYTES else None
    card = None if others_bytes else _card(reading.accelerators, total)
    if card is not None:
        one = card.key
    elif total is not None:
        one = f"{total / GIB:.2f}GiB"
    else:
        return None
    count = min(reading.num_gpus, _MAX_GPUS)
    return one if count == 1 else f"{count}x{one}"


def _card(words: tuple[str, ...], total: int | None) -> Accelerator | None:
    """The first accelerator that the words begin with, of the memory that the message states."""
    for text in words:
        parts = text.split()
        for end in range(len(parts), 0, -1):
            name = " ".join(parts[:end])
            if total is not None:
                found = match(name, total)
            else:
                try:
                    found = lookup(name)
                except HardwareError:
                    found = None
            if found is not None:
                return found
    return None


def _is_apple(reading: Reading) -> bool:
    return reading.first is not None and reading.first.evidence.rule.startswith("mps")
