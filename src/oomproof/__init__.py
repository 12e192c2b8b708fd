"""oomproof: run the largest model your GPUs can hold, and never meet `CUDA out of memory`.

    import oomproof

    plan = oomproof.plan("llama-3.1-70b", gpus="2x24GiB,1x12GiB")   # no GPU, no download
    with oomproof.load("tiny") as model:                            # plans, then loads as planned
        print(model.generate("It was a dark night"))

Importing the package imports neither torch nor CUDA; each name below is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from oomproof.engine.model import Model, Stream
    from oomproof.errors import OomproofError
    from oomproof.guarding.retry import executable_batch_size, guard
    from oomproof.planning.plan import Plan
    from oomproof.session import (
        evaluate,
        from_pretrained,
        hand_off,
        load,
        merge,
        plan,
        plan_tuning,
        quantize,
        rehearse,
        rehearse_tuning,
        tune,
    )

__all__ = [
    "Model",
    "OomproofError",
    "Plan",
    "Stream",
    "evaluate",
    "executable_batch_size",
    "from_pretrained",
    "guard",
    "hand_off",
    "load",
    "merge",
    "plan",
    "plan_tuning",
    "quantize",
    "rehearse",
    "rehearse_tuning",
    "tune",
]

_HOMES = {
    "Model": "oomproof.engine.model",
    "OomproofError": "oomproof.errors",
    "Plan": "oomproof.planning.plan",
    "Stream": "oomproof.engine.model",
    "evaluate": "oomproof.session",
    "executable_batch_size": "oomproof.guarding.retry",
    "from_pretrained": "oomproof.session",
    "guard": "oomproof.guarding.retry",
    "hand_off": "oomproof.session",
    "load": "oomproof.session",
    "merge": "oomproof.session",
    "plan": "oomproof.session",
    "plan_tuning": "oomproof.session",
    "quantize": "oomproof.session",
    "rehearse": "oomproof.session",
    "rehearse_tuning": "oomproof.session",
    "tune": "oomproof.session",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
