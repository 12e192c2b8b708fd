"""Bytes out of the words of an allocator: torch's of every version since 1.0, ggml's, the host's.

torch up to 2.0     Tried to allocate A (GPU 0; T total capacity; L already allocated; F free;
                    R reserved in total by PyTorch)
torch from 2.1 on   Tried to allocate A. GPU 0 has a total capacity of T of which F is free. Process
                    123 has O memory in use. Including non-PyTorch memory, this process has P memory
                    in use. X allowed; Of the allocated memory L is allocated by PyTorch, with G
                    allocated in private pools (e.g., CUDA Graphs), and U is reserved by PyTorch but
                    unallocated.

R is everything that the allocator holds, U only what is idle of it; here both become
`reserved_bytes`, R. Sizes are of base 1024 in all of them, also where MPS writes "GB".
"""

from __future__ import annotations

import re
from fractions import Fraction

from oomproof.faults.fault import MemoryFigures

MAX_TEXT = 8192
"""Characters that are looked at."""
_MAX_BYTES = 1 << 50
_UNITS = {"b": 1, "bytes": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = r"([0-9]{1,18}(?:\.[0-9]{1,6})?)\s?(bytes|B|[KMGT]i?B)\b"
_CONTEXT_BYTES = 3 << 30
"""The most that a process holds beside torch's allocator before it is taken for another one."""


def _compile(before: str, after: str = "") -> re.Pattern[str]:
    return re.compile(before + _SIZE + after)


_TRIED = (
    _compile(r"(?i:tried|trying) to allocate\s"),
    _compile(r"\ballocating\s", r" on device [0-9]"),
    _compile(r"\byou tried to (?:allocate|mmap)\s"),
    _compile(r"\bInvalid buffer size: "),
    _compile(r"\bunable to mmap\s"),
    _compile(r"\bUnable to allocate\s", r" for an array"),
)
_TOTAL = (_compile(r"total capaci?ty of\s"), _compile(r";\s", r" total capacity"))
_FREE = (_compile(r"of which\s", r" is free"), _compile(r";\s", r" free\b"))
_ALLOCATED = (
    _compile(r"Of the allocated memory\s", r" is allocated"),
    _compile(r";\s", r" already allocated"),
    _compile(r"MPS allocated: "),
)
_RESERVED = (_compile(r";\s", r" reserved in total"),)
_UNALLOCATED = (_compile(r"and\s", r" is reserved by PyTorch but"), _compile(r";\s", r" cached"))
_POOLS = (_compile(r"with\s", r" allocated in private pools"),)
_THIS_PROCESS = (_compile(r"this process has\s", r" memory in use"),)
_PROCESS = _compile(r"Process [0-9]{1,10} has\s", r" memory in use")
_ALLOWED = (_compile(r"\.\s", r" allowed;"), _compile(r";\s", r" allowed;"))
_MPS_MOST = (_compile(r"max allowed: "),)
_MPS_OTHER = (_compile(r"other allocations: "),)
_DEVICE = (
    re.compile(r"\bGPU ([0-9]{1,3})\b(?:;| has a total)"),
    re.compile(r"\bon device ([0-9]{1,3}):"),
    re.compile(r"\bcuda:([0-9]{1,3})\b"),
)
_VLLM_CACHE = re.compile(
    rf"\({_SIZE} KV cache is needed, which is larger than the available KV cache memory \({_SIZE}"
)
_VLLM_STARTUP = re.compile(
    rf"Free memory on device(?: cuda:[0-9]+)? \(([0-9.]{{1,12}})/{_SIZE}\) on startup"
)


def read_figures(text: str) -> MemoryFigures:
    """The bytes that a message names; what cannot be true of a device is left out.

    Args:
        text: A message, of one or several lines; at most MAX_TEXT characters are looked at.
    """
    text = " ".join(text[:MAX_TEXT].split())
    if "MPS allocated" in text:
        return _mps(text)
    if found := _VLLM_CACHE.search(text):
        return MemoryFigures(
            tried_bytes=_bytes(found[1], found[2]), free_bytes=_bytes(found[3], found[4])
        )
    if found := _VLLM_STARTUP.search(text):
        total = _bytes(found[2], found[3])
        return MemoryFigures(free_bytes=_bytes(found[1], found[3]), total_bytes=total)
    return _torch(text)


def read_device(text: str) -> int | None:
    """The index of the GPU that a message names."""
    text = " ".join(text[:MAX_TEXT].split())
    for pattern in _DEVICE:
        if found := pattern.search(text):
            return int(found[1])
    return None


def _torch(text: str) -> MemoryFigures:
    total, free = _first(_TOTAL, text), _first(_FREE, text)
    allocated, pools = _first(_ALLOCATED, text), _first(_POOLS, text)
    unallocated = _first(_UNALLOCATED, text)
    reserved = _first(_RESERVED, text)
    if reserved is None and allocated is not None and unallocated is not None:
        reserved = allocated + unallocated
    process, other = _processes(text, reserved, total)
    return MemoryFigures(
        tried_bytes=_first(_TRIED, text),
        total_bytes=total,
        free_bytes=free,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        pools_bytes=pools,
        process_bytes=process,
        other_bytes=other,
        allowed_bytes=_first(_ALLOWED, text),
    )


def _processes(text: str, reserved: int | None, total: int | None) -> tuple[int | None, int | None]:
    """What this process holds, and what the others that are listed hold.

    In a container the process does not know itself by the number that the driver has for it: it is
    listed as another one, beside "this process has 0 bytes", or alone. It is the one that holds
    what torch has reserved and a context more. WSL prints 17179869184.00 GiB, which is nobody's.
    """
    own = _first(_THIS_PROCESS, text)
    if own is not None and ((reserved or 0) > own or (total is not None and own > total)):
        own = None
    listed = [_bytes(*found) for found in _PROCESS.findall(text)]
    others = [one for one in listed if one is not None and (total is None or one <= total)]
    if own is None and reserved:
        near = [one for one in others if 0 <= one - reserved <= _CONTEXT_BYTES]
        if near:
            own = min(near)
            others.remove(own)
    return own, sum(others) if others else None


def _mps(text: str) -> MemoryFigures:
    allocated, other = _first(_ALLOCATED, text), _first(_MPS_OTHER, text)
    return MemoryFigures(
        tried_bytes=_first(_TRIED, text),
        allocated_bytes=allocated,
        reserved_bytes=None if allocated is None or other is None else allocated + other,
        allowed_bytes=_first(_MPS_MOST, text),
    )


def _first(patterns: tuple[re.Pattern[str], ...], text: str) -> int | None:
    for pattern in patterns:
        if found := pattern.search(text):
            return _bytes(found[1], found[2])
    return None


def _bytes(number: str, unit: str) -> int | None:
    scale = _UNITS[unit.casefold() if len(unit) != 2 and len(unit) != 3 else unit[0].casefold()]
    try:
        size = int(Fraction(number) * scale)
    except ValueError:  # "1.2.3" of a message that was cut
        return None
    return size if size <= _MAX_BYTES else None
