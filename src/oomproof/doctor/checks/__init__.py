"""The checks: one verdict a capability, each with what mends it.

A check is one entry in its capability's registry; it looks at nothing but the facts.
"""

from __future__ import annotations

from oomproof.doctor.checks.attention import FLASH_ATTENTION
from oomproof.doctor.checks.downloads import DOWNLOADS
from oomproof.doctor.checks.formats import BF16, EIGHT_BIT, FOUR_BIT, FP8
from oomproof.doctor.checks.gpu import GPU
from oomproof.doctor.checks.health import GPU_HEALTH
from oomproof.doctor.checks.memory import ALLOCATOR, MEMORY
from oomproof.doctor.checks.native import NATIVE_ENGINE
from oomproof.doctor.checks.packages import FINE_TUNING, RUN_MODELS
from oomproof.doctor.checks.several import SEVERAL_GPUS
from oomproof.doctor.facts import Facts
from oomproof.doctor.findings import Capability, Verdict, judge

CAPABILITIES: tuple[Capability, ...] = (
    RUN_MODELS,
    MEMORY,
    ALLOCATOR,
    GPU,
    GPU_HEALTH,
    NATIVE_ENGINE,
    FOUR_BIT,
    EIGHT_BIT,
    BF16,
    FP8,
    FLASH_ATTENTION,
    SEVERAL_GPUS,
    FINE_TUNING,
    DOWNLOADS,
)


def check_all(facts: Facts) -> tuple[Verdict, ...]:
    """Every verdict, in the order of CAPABILITIES."""
    return tuple(judge(capability, facts) for capability in CAPABILITIES)
