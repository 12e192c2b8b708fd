"""A rule: words that a message begins with, and what they mean.

A rule's pattern is matched at the beginning of a message. Behind an exception's type that is
enough; a line without one must match `bare`, which only words that no person writes by chance do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from oomproof.faults.codes import CudaCode
from oomproof.faults.fault import Cause, FaultClass
from oomproof.faults.line import Line


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a rule says."""

    fault_class: FaultClass
    cause: Cause
    code: int | None = None
    code_name: str | None = None


Judge = Callable[[re.Match[str], str], Verdict | None]
"""From the match and the whole message to a verdict; None where it is something else after all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One form of words."""

    name: str
    needle: str
    """Part of every text that the rule matches: looked for before the pattern is tried."""
    pattern: re.Pattern[str]
    judge: Judge
    bare: re.Pattern[str] | None = None
    """What a line without an exception's type must begin with; None: such lines do not count."""
    about_values: bool = False
    """Whether ValueError and its like count: they are also raised over what a user has typed."""


_ABOUT_VALUES = frozenset(
    (
        *("ValueError", "TypeError", "KeyError", "IndexError", "LookupError", "AttributeError"),
        *("NameError", "AssertionError", "SyntaxError", "ImportError", "ModuleNotFoundError"),
        *("OSError", "FileNotFoundError", "FileExistsError", "NotADirectoryError"),
        *("IsADirectoryError", "PermissionError", "JSONDecodeError", "UnicodeDecodeError"),
        *("ValidationError", "TemplateError", "HTTPError", "HTTPException", "BadRequestError"),
        *("RepositoryNotFoundError", "HFValidationError", "InputError", "ConfigError"),
        *("RequestError", "ModelNotFoundError", "HardwareError"),
    )
)


def match_rules(rules: Iterable[Rule], line: Line, whole: str) -> tuple[Rule, Verdict] | None:
    """The first rule that a line matches.

    Args:
        rules: In the order in which they are tried.
        line: The line.
        whole: The message with the lines that follow: what decides is sometimes there.
    """
    for rule in rules:
        if rule.needle not in line.message:
            continue
        if line.type is None:
            pattern = rule.bare
        elif rule.about_values or line.short_type not in _ABOUT_VALUES:
            pattern = rule.pattern
        else:
            pattern = None
        found = None if pattern is None else pattern.match(line.message)
        if found is not None and (verdict := rule.judge(found, whole)) is not None:
            return rule, verdict
    return None


def verdict_of(code: CudaCode) -> Verdict:
    """What an error of CUDA's means."""
    return Verdict(
        fault_class=code.fault_class,
        cause=code.cause,
        code=code.number,
        code_name=code.name or None,
    )


def always(fault_class: FaultClass, cause: Cause) -> Judge:
    """The same verdict for whatever matches."""
    verdict = Verdict(fault_class=fault_class, cause=cause)
    return lambda _found, _whole: verdict


def rule(
    name: str,
    needle: str,
    pattern: str,
    judge: Judge,
    *,
    bare: bool | str = False,
    about_values: bool = False,
) -> Rule:
    """One rule; `bare` True takes the same pattern for lines without a type, text another one."""
    compiled = re.compile(pattern)
    plain = compiled if bare is True else re.compile(bare) if bare else None
    return Rule(
        name=name,
        needle=needle,
        pattern=compiled,
        judge=judge,
        bare=plain,
        about_values=about_values,
    )
