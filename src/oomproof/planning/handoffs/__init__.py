"""Plans for other engines: each sized in that engine's own format, as a command it understands.

No engine is imported. HANDOFFS maps a target's name to its function; a new target is one file and
one entry.
"""

from __future__ import annotations

from collections.abc import Callable

from oomproof.errors import InputError
from oomproof.hardware.spec import Hardware
from oomproof.models.spec import ModelSpec
from oomproof.planning.handoffs.handoff import HandOff
from oomproof.planning.handoffs.llama_cpp import hand_off_llama_cpp
from oomproof.planning.handoffs.mlx import hand_off_mlx
from oomproof.planning.handoffs.vllm import hand_off_vllm
from oomproof.planning.request import PlanRequest

HANDOFFS: dict[str, Callable[[ModelSpec, Hardware, PlanRequest, str], HandOff]] = {
    "vllm": hand_off_vllm,
    "llama.cpp": hand_off_llama_cpp,
    "mlx": hand_off_mlx,
}


def require_target(target: str) -> None:
    """Refuses an engine that no plan can be handed to.

    Raises:
        InputError: There is no such target.
    """
    if target not in HANDOFFS:
        raise InputError(
            f"no plan can be handed to {target[:40]!r}", remedy=f"use one of {', '.join(HANDOFFS)}"
        )


def hand_off(
    target: str,
    spec: ModelSpec,
    hardware: Hardware,
    request: PlanRequest,
    *,
    format_name: str = "auto",
) -> HandOff:
    """The plan of a model for another engine.

    Args:
        target: A key of HANDOFFS.
        spec: The model.
        hardware: The machine, or for MLX several Macs.
        request: Context, concurrency, KV format and limits.
        format_name: A format of the target, or of ours that it has too; "auto" for the best
            quality that fits.

    Raises:
        InputError: Unknown target, a context beyond the model's, or a machine or format that the
            target does not know.
    """
    require_target(target)
    return HANDOFFS[target](spec, hardware, request, format_name)
