"""PYTORCH_ALLOC_CONF, read as torch reads it: "key:value,key:[64:2,128:4]"."""

from __future__ import annotations

import re
from dataclasses import dataclass

KNOWN = frozenset(
    (
        "backend",
        "expandable_segments",
        "garbage_collection_threshold",
        "graph_capture_record_stream_reuse",
        "large_segment_size_mb",
        "max_non_split_rounding_mb",
        "max_split_size_mb",
        "per_process_memory_fraction",
        "pinned_max_cached_size_mb",
        "pinned_max_power2_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "roundup_power2_divisions",
        "throw_on_cudamalloc_oom",
        "use_async_allocator",
    )
)
"""Keys of torch 2.10 to 2.13."""
_PAIR = re.compile(r"\s*([^:,\[\]\s]+)\s*:\s*(\[[^\[\]]*\]|[^:,\[\]]+)")
_NUMBER = re.compile(r"-?\d{1,12}(?:\.\d{1,12})?", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What one of the variables says."""

    variable: str
    text: str
    pairs: tuple[tuple[str, str], ...]
    malformed: str | None
    """What cannot be read, as a sentence."""

    def number(self, key: str) -> float | None:
        """A setting's number, None where it is not set or none."""
        value = dict(self.pairs).get(key, "")
        return float(value) if _NUMBER.fullmatch(value) else None


def read_settings(variable: str, text: str) -> Settings:
    """Never fails: what cannot be read is said in `malformed`."""
    pairs: list[tuple[str, str]] = []
    at, malformed = 0, None
    while at < len(text):
        if text[at] in ", ":
            at += 1
            continue
        found = _PAIR.match(text, at)
        if found is None:
            malformed = f"{text[at : at + 40]!r} is not KEY:VALUE"
            break
        pairs.append((found[1], found[2].strip()))
        at = found.end()
    return Settings(variable=variable, text=text, pairs=tuple(pairs), malformed=malformed)
