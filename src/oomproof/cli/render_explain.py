"""An explained failure as people read it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import typer

from oomproof.postmortem.explain import sentence_of

if TYPE_CHECKING:
    from oomproof.faults.fault import Fault
    from oomproof.postmortem.advice import Advice
    from oomproof.postmortem.explain import Explanation

_WIDTH = 96
_LABEL = 9


def print_explanation(found: Explanation) -> None:
    """What happened, why, what follows, and the command."""
    _say("what", f"{found.what}{_where(found.fault)}.")
    _say("evidence", _evidence(found.fault))
    if found.blame is not None:
        _say("blame", f"{found.blame.term.value}: {found.blame.why}.")
    _say("then", f"{found.then}.")
    if found.advice is not None:
        _print_advice(found.advice)
    for number, remedy in enumerate(found.remedies):
        _say("" if number else "also" if found.advice else "do", remedy)
    if found.more:
        counts = ", ".join(f"{count:,} × {cause.value}" for cause, count in found.more.items())
        _say("more", f"{sum(found.more.values()):,} failures follow in it: {counts}")


def _print_advice(advice: Advice) -> None:
    if advice.plan is not None:
        beside = "" if advice.others_bytes is None else ", beside the others"
        _say("plan", f"{advice.model} on {advice.gpus}{beside}: {sentence_of(advice.plan)}.")
        if advice.alone is not None:
            _say("", f"Without the others: {sentence_of(advice.alone)}.")
    elif advice.model is None:
        _say("plan", "the text names no model; put its name in the place of MODEL")
    elif advice.gpus is None:
        _say("plan", f"the text does not say which GPUs {advice.model} was run on")
    else:
        _say("plan", f"{advice.model} is not in the catalog; its config.json is read from the hub")
    for number, command in enumerate(advice.commands):
        # A command is copied, so it is never wrapped.
        typer.echo(f"{'' if number else 'run':<{_LABEL}} {command}")


def _evidence(fault: Fault) -> str:
    code = "" if fault.evidence.code is None else f", code {fault.evidence.code}"
    named = "" if fault.evidence.code_name is None else f" {fault.evidence.code_name}"
    return f"{fault.evidence.text} ({fault.cause.value}{code}{named})"


def _where(fault: Fault) -> str:
    return "" if fault.device is None else f", on GPU {fault.device}"


def _say(label: str, text: str) -> None:
    wrapped = textwrap.wrap(
        text, _WIDTH - _LABEL - 1, break_long_words=False, break_on_hyphens=False
    )
    for number, line in enumerate(wrapped):
        typer.echo(f"{'' if number else label:<{_LABEL}} {line}")
