"""Whether models can be downloaded, and kept."""

from __future__ import annotations

import shlex

from oomproof.doctor.facts import Facts
from oomproof.doctor.findings import Capability, Check, Finding, Summary
from oomproof.doctor.view import version
from oomproof.units import GIB, format_bytes

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_LITTLE_BYTES = 10 * GIB
_TRUE = ("1", "ON", "YES", "TRUE")


def _writable(facts: Facts) -> Finding | None:
    cache = facts.cache
    if cache is None or cache.writable is not False:
        return None
    return Finding(
        status="missing",
        detail=f"this user may not write {cache.path}",
        remedy='export HF_HOME="$HOME/huggingface"'
        if facts.system.container
        else f'sudo chown -R "$(id -u)" {_quoted(cache.path)}',
    )


def _quoted(path: str) -> str:
    """For a shell, which does not look for "~" inside of quotes."""
    if path.startswith("~/"):
        return '"$HOME"' + shlex.quote(path[1:])
    return shlex.quote(path)


def _room(facts: Facts) -> Finding | None:
    cache = facts.cache
    if cache is None or cache.free_bytes is None or cache.free_bytes >= _LITTLE_BYTES:
        return None
    return Finding(
        status="limited",
        detail=f"{format_bytes(cache.free_bytes)} free at {cache.path}; an 8B takes 15 GiB",
        remedy="hf cache rm MODEL (hf cache ls names them), or HF_HOME on a larger disk",
    )


def _transfer(facts: Facts) -> Finding | None:
    """An accelerator that older versions of the hub's library insist on once it is asked for."""
    asked = _is_on(facts, "HF_HUB_ENABLE_HF_TRANSFER")
    if not asked or "hf-transfer" in facts.packages:
        return None
    if version(facts, "huggingface_hub")[:1] != (0,):
        return None
    return Finding(
        status="missing",
        detail="HF_HUB_ENABLE_HF_TRANSFER is set, and hf_transfer is not installed",
        remedy="unset HF_HUB_ENABLE_HF_TRANSFER",
    )


def _offline(facts: Facts) -> Finding | None:
    for name in _OFFLINE:
        if _is_on(facts, name):
            return Finding(
                status="limited",
                detail=f"{name} is set: only what is downloaded already can be run",
                remedy=f"unset {name}",
            )
    return None


def _is_on(facts: Facts, name: str) -> bool:
    return facts.environment.get(name, "").upper() in _TRUE


def _summary(facts: Facts) -> Summary:
    cache = facts.cache
    if cache is None:
        problem = next((run.problem for run in facts.probes if run.name == "cache"), None)
        return Summary(status="limited", detail=f"the cache was not read: {problem or 'no reason'}")
    free = "" if cache.free_bytes is None else f", {format_bytes(cache.free_bytes)} free"
    mirror = facts.environment.get("HF_ENDPOINT")
    extra = f", from {mirror}" if mirror else ""
    return Summary(detail=f"kept in {cache.path}{free}{extra}")


DOWNLOADS = Capability(
    name="downloads",
    summary=_summary,
    checks=(
        Check(name="cache-writable", run=_writable),
        Check(name="hf-transfer", run=_transfer),
        Check(name="disk", run=_room),
        Check(name="offline", run=_offline),
    ),
)
