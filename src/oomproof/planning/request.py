"""What the user asks of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from oomproof.errors import InputError
from oomproof.formats import get_format
from oomproof.memory.kv_cache import KV_FORMATS

DEFAULT_CONTEXT = 8192
MAX_CONCURRENCY = 4096

_NONE: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """The options of `plan`; it refuses what makes no sense before anything is computed."""

    format: str = "auto"
    """A name of formats.FORMATS, or "auto": the best quality that fits."""
    kv_format: str = "auto"
    """"bf16", "fp16", "fp8", or "auto": the compute dtype."""
    context: int | Literal["auto"] | None = None
    """Prompt and answer in tokens; None for min(8192, the model's maximum)."""
    concurrency: int = 1
    """Requests at once."""
    reserve_bytes: int = 0
    """Free memory of each device that the plan leaves alone."""
    max_memory: Mapping[int, int] = field(default_factory=lambda: _NONE)
    """Device index → most bytes the plan may use there."""
    cap_bytes: int | None = None
    """Most bytes of every device, enforced while running too."""
    engine: str = "auto"
    """"transformers", or "auto"."""

    def __post_init__(self) -> None:
        if self.format != "auto":
            get_format(self.format)
        if self.kv_format not in ("auto", *KV_FORMATS):
            raise InputError(
                f"unknown KV format {self.kv_format!r}",
                remedy=f"use one of auto, {', '.join(KV_FORMATS)}",
            )
        if isinstance(self.context, int) and self.context < 1:
            raise InputError(f"context {self.context} must be at least 1 token")
        if not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise InputError(f"concurrency {self.concurrency} must be from 1 to {MAX_CONCURRENCY}")
        if self.reserve_bytes < 0:
            raise InputError(f"reserve {self.reserve_bytes} must not be negative")
        if self.cap_bytes is not None and self.cap_bytes < 1:
            raise InputError(f"cap {self.cap_bytes} must be at least 1 byte")
        for index, limit_bytes in self.max_memory.items():
            if limit_bytes < 0:
                raise InputError(
                    f"max-memory {limit_bytes} of device {index} must not be negative",
                    remedy="0 keeps the plan off the device",
                )
