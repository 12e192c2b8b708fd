"""The child's way from a plan's JSON to an engine; the only file here that leads to torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from oomproof.agreement import with_planned_adapter
from oomproof.errors import PlanMismatchError
from oomproof.guarding.engine import GuardedEngine
from oomproof.guarding.machine import Machine
from oomproof.guarding.situation import Target
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import Hardware
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSource, ModelSpec
from oomproof.monitoring.monitor import monitored
from oomproof.planning.plan import Plan
from oomproof.starting import Contract, start_engine
from oomproof.worker.messages import Load

if TYPE_CHECKING:
    from oomproof.engine.protocol import Engine
    from oomproof.worker.child import Parent


def start(load: Load, parent: Parent) -> GuardedEngine:
    """Loads as planned, from files that are here already; watched and guarded as in one process.

    Args:
        load: The plan, the folder and what is allowed where memory runs out.
        parent: Told of bytes loaded and of rungs; asked for the files of smaller models.

    Raises:
        OomproofError: As `GuardedEngine`; the folder holds another model than was planned.
    """
    plan = Plan.from_json(load.plan)
    spec = with_planned_adapter(_spec(load.folder, plan.model, plan.source), plan)
    if spec.fingerprint != plan.fingerprint:
        raise PlanMismatchError((f"{load.folder} is another model than the one that was planned",))
    folders = {(spec.fingerprint, spec.source): load.folder}

    def find(model: str) -> ModelSpec:
        found = parent.find(model)
        smaller = _spec(found.folder, found.id, found.source)
        folders[smaller.fingerprint, smaller.source] = found.folder
        return smaller

    def start_watched(target: Target, hardware: Hardware) -> Engine:
        engine = start_engine(
            Contract(plan=target.plan, spec=target.spec, hardware=hardware),
            Path(folders[target.spec.fingerprint, target.spec.source]),
            parent.progress,
            trust_remote_code=load.trust_remote_code,
        )
        try:
            return monitored(engine, target.plan, parent.tell)
        except BaseException:
            engine.close()
            raise

    return GuardedEngine(
        Target(plan=plan, spec=spec),
        start_watched,
        hardware=probe(),
        allowed=load.allowed,
        on_event=parent.tell,
        machine=Machine(find=find),
    )


def _spec(folder: str, name: str, source: ModelSource) -> ModelSpec:
    """What a folder holds, under the name that it was asked for by."""
    return replace(resolve(folder), id=name, source=source)
