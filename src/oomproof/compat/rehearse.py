"""transformers, to be rehearsed: random weights at true shapes, loaded as a checkpoint's are."""

from __future__ import annotations

import torch
import transformers

from oomproof.compat.engine import TransformersEngine
from oomproof.compat.measure import MemoryMeter
from oomproof.compat.model import import_libraries, load_random_model
from oomproof.engine.rehearse import Rehearsable
from oomproof.hardware.spec import Hardware
from oomproof.loading.reader import Progress
from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import Plan


def rehearsable(
    plan: Plan, spec: ModelSpec, hardware: Hardware, progress: Progress | None = None
) -> Rehearsable:
    """The engine, not yet started.

    Args:
        plan: What goes where.
        spec: The model.
        hardware: Probed before this process touched a GPU.
        progress: Told of bytes made.
    """
    import_libraries(plan, spec)
    meter = MemoryMeter(plan, hardware)

    def start() -> TransformersEngine:
        loaded = load_random_model(plan, spec, progress=progress)
        return TransformersEngine(loaded, plan, spec, meter)

    return Rehearsable(
        start=start,
        measured=meter.terms,
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
    )
