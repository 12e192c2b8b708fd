"""From an agreed plan to a running engine: the one place that knows both of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from oomproof.hardware.spec import Hardware
from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import Plan

if TYPE_CHECKING:
    from oomproof.engine.protocol import Engine
    from oomproof.engine.rehearse import Rehearsable
    from oomproof.engine.tune import Told, TuningReport

Loaded = Callable[[int, int], None]
"""Called with (bytes loaded, bytes in all)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """A plan that can be executed here and now, with what it was made from."""

    plan: Plan
    spec: ModelSpec
    """With the headers of its checkpoint."""
    hardware: Hardware


def start_engine(
    contract: Contract,
    folder: Path,
    progress: Loaded | None = None,
    *,
    trust_remote_code: bool = False,
    on_reading: Callable[[], None] | None = None,
) -> Engine:
    """The engine that the plan names, with the checkpoint's weights.

    Args:
        contract: What to load.
        folder: Where the model's files are.
        progress: Told of bytes read.
        trust_remote_code: Lets transformers run code that the folder ships.
        on_reading: Called once, when reading begins.

    Raises:
        LoadError: The checkpoint does not give what the plan promises.
        CheckpointError: A file is damaged.
        PlanDoesNotFitError: A device has less free memory now than the plan needs.
    """
    from oomproof.conversion.manifest import verifying
    from oomproof.loading.devices import prepare_devices, release_devices

    prepare_devices(contract.plan, contract.hardware)
    engine: Engine | None = None
    try:
        # What `quantize` wrote has digests; the processor compares them while the disk is read.
        with verifying(folder):
            engine = _start(
                contract, folder, progress, on_reading, trust_remote_code=trust_remote_code
            )
    except BaseException:
        if engine is not None:
            engine.close()
        release_devices(contract.plan)
        raise
    return engine


def _start(
    contract: Contract,
    folder: Path,
    progress: Loaded | None,
    on_reading: Callable[[], None] | None,
    *,
    trust_remote_code: bool,
) -> Engine:
    plan, spec, hardware = contract.plan, contract.spec, contract.hardware
    if plan.engine == "native":
        from oomproof.engine.native.load import load_engine

        return load_engine(plan, spec, hardware, folder, progress=progress, on_reading=on_reading)
    from oomproof.compat.engine import TransformersEngine
    from oomproof.compat.measure import MemoryMeter
    from oomproof.compat.model import import_libraries, load_model

    import_libraries(plan, spec)
    if on_reading is not None:
        on_reading()
    meter = MemoryMeter(plan, hardware)
    loaded = load_model(plan, spec, folder, progress=progress, trust_remote_code=trust_remote_code)
    return TransformersEngine(loaded, plan, spec, meter)


def rehearsable(contract: Contract, progress: Loaded | None = None) -> Rehearsable:
    """The engine that the plan names, to be started with random weights.

    Raises:
        PlanDoesNotFitError: A device has less free memory now than the plan needs.
    """
    from oomproof.engine.rehearse import Rehearsable
    from oomproof.loading.devices import prepare_devices

    plan, spec, hardware = contract.plan, contract.spec, contract.hardware
    prepare_devices(plan, hardware)
    if plan.engine == "native":
        from oomproof.engine.native.load import load_random_engine, versions
        from oomproof.engine.native.meter import NativeMeter

        meter = NativeMeter(hardware)
        return Rehearsable(
            start=lambda: load_random_engine(plan, spec, meter, progress=progress),
            measured=meter.terms,
            versions=versions(),
        )
    from oomproof.compat.rehearse import rehearsable as with_transformers

    return with_transformers(plan, spec, hardware, progress)


def import_engine(contract: Contract) -> None:
    """Imports what an engine needs, so that its loading is timed without it."""
    import_module("oomproof.conversion.manifest")
    if contract.plan.engine == "native":
        import_module("oomproof.engine.native.load")
        return
    from oomproof.compat.model import import_libraries

    import_module("oomproof.compat.rehearse")
    import_libraries(contract.plan, contract.spec)


def tune_launches(contract: Contract, told: Told | None = None) -> TuningReport:
    """Finds and keeps the fastest launches of a plan's products, where it will run.

    Args:
        contract: Whose shapes, format and requests are meant.
        told: Told of each product.

    Raises:
        InputError: The format has none to choose from, or what is found cannot be kept.
        NotRunnableError: There is no GPU in the plan, or it does not use the kernel.
        PlanDoesNotFitError: A device has less free memory now than the plan needs.
    """
    from oomproof.engine.tune import check_tunable, tune_plan
    from oomproof.loading.devices import prepare_devices, release_devices

    check_tunable(contract.plan)
    prepare_devices(contract.plan, contract.hardware)
    try:
        return tune_plan(contract.plan, contract.spec, told)
    finally:
        release_devices(contract.plan)


def start_timed(contract: Contract, folder: Path | None, progress: Loaded | None) -> Engine:
    """An engine with the folder's weights, or, where there is none, with random ones."""
    if folder is None:
        return rehearsable(contract, progress).start()
    return start_engine(contract, folder, progress)
