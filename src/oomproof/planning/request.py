"""What the user asks of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from oomproof.errors import InputError
from oomproof.formats import FIT, SEARCHED_FORMATS, get_format, is_known_format
from oomproof.memory.kv_cache import KV_FORMATS

DEFAULT_CONTEXT = 8192
MAX_CONCURRENCY = 4096
COMPUTE_DTYPES = ("auto", "bfloat16", "float16", "float32")

Offload = Literal["none", "cpu"]

_NONE: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """The options of `plan`; it refuses what makes no sense before anything is computed."""

    format: str = "auto"
    """A name of formats.FORMATS, "auto": the best quality that fits, or "fit": a mixture that fills
    the memory there is."""
    kv_format: str = "auto"
    """"bf16", "fp16", "fp8", "fp32", or "auto": the compute dtype."""
    compute_dtype: str = "auto"
    """"bfloat16", "float16", "float32" for quantized weights; "auto": what the devices are made
    for. Other weights are computed in their own dtype."""
    context: int | Literal["auto"] | None = None
    """Prompt and answer in tokens; None for min(8192, the model's maximum)."""
    concurrency: int | Literal["auto"] = 1
    """Requests at once; "auto": as many as fit, in the format that is chosen for one."""
    reserve_bytes: int = 0
    """Free memory of each device that the plan leaves alone."""
    max_memory: Mapping[int, int] = field(default_factory=lambda: _NONE)
    """Device index → most bytes the plan may use there."""
    cap_bytes: int | None = None
    """Most bytes of every device, enforced while running too."""
    engine: str = "auto"
    """"native", "transformers", or "auto": ours where it knows the architecture."""
    offload: Offload = "none"
    """"cpu": layers that fit on no device stay in host memory and are streamed; "none"."""
    max_host_bytes: int | None = None
    """Most host RAM the plan may use."""
    what_would_it_take: bool = False
    """Whether the smallest listed hardware that would do is looked for."""
    force: bool = False
    """Accepts a plan that streams at less than a token a second."""
    search: bool = False
    """Block scales of 4-bit formats are searched for the least error while loading; else they are
    bitsandbytes' own."""

    def __post_init__(self) -> None:
        if self.format != "auto" and not is_known_format(self.format):
            get_format(self.format)
        if self.search and self.format not in ("auto", FIT, *SEARCHED_FORMATS):
            raise InputError(
                f"{self.format} has no block scales to search",
                remedy=f"leave --search out, or use one of {', '.join(SEARCHED_FORMATS)}",
            )
        if self.kv_format not in ("auto", *KV_FORMATS):
            raise InputError(
                f"unknown KV format {self.kv_format!r}",
                remedy=f"use one of auto, {', '.join(KV_FORMATS)}",
            )
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise InputError(
                f"unknown compute dtype {self.compute_dtype!r}",
                remedy=f"use one of {', '.join(COMPUTE_DTYPES)}",
            )
        if isinstance(self.context, int) and self.context < 1:
            raise InputError(f"context {self.context} must be at least 1 token")
        offload: str = self.offload
        if offload == "disk":
            raise InputError(
                "offload 'disk' is refused: every token would read the layers from the disk, "
                "at hundredths of a token a second",
                remedy="use --offload cpu, a smaller format or a smaller model",
            )
        if self.offload not in get_args(Offload):
            raise InputError(
                f"unknown offload {self.offload!r}",
                remedy=f"use one of {', '.join(get_args(Offload))}",
            )
        self._check_limits()

    def _check_limits(self) -> None:
        if self.concurrency != "auto" and not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise InputError(f"concurrency {self.concurrency} must be from 1 to {MAX_CONCURRENCY}")
        if self.reserve_bytes < 0:
            raise InputError(f"reserve {self.reserve_bytes} must not be negative")
        if self.cap_bytes is not None and self.cap_bytes < 1:
            raise InputError(f"cap {self.cap_bytes} must be at least 1 byte")
        if self.max_host_bytes is not None and self.max_host_bytes < 1:
            raise InputError(f"max-memory cpu={self.max_host_bytes} must be at least 1 byte")
        for index, limit_bytes in self.max_memory.items():
            if limit_bytes < 0:
                raise InputError(
                    f"max-memory {limit_bytes} of device {index} must not be negative",
                    remedy="0 keeps the plan off the device",
                )
