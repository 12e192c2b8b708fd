"""From a contract to a model that answers: its engine guarded, its tokenizer parsed beside.

open_model   in this process
open_apart   in a supervised process of its own; the ladder is there, beside the engine
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from oomproof.compat.tokenizer import TransformersTokenizer, read_generation_defaults
from oomproof.engine.model import GenerationDefaults, Model
from oomproof.errors import NotRunnableError, PlanDoesNotFitError
from oomproof.guarding.engine import GuardedEngine, OnEvent, tell_rung
from oomproof.guarding.ladder import Ladder, event_of
from oomproof.guarding.machine import Machine, find_model
from oomproof.guarding.situation import Situation, Target, judge
from oomproof.hardware.spec import Hardware
from oomproof.models.spec import ModelSource, ModelSpec
from oomproof.monitoring.monitor import monitored
from oomproof.starting import Contract, Loaded, start_engine

if TYPE_CHECKING:
    from oomproof.engine.protocol import Engine

Key = tuple[str, ModelSource]
Fetch = Callable[[ModelSpec], Path]
"""The folder with a model's files, downloaded where they are not here yet."""


def open_model(
    contract: Contract,
    fetch: Fetch,
    *,
    allowed: Sequence[str] = (),
    on_event: OnEvent | None = None,
    progress: Loaded | None = None,
    trust_remote_code: bool = False,
    refusal: PlanDoesNotFitError | None = None,
) -> Model:
    """Loads a contract's model, by another plan where memory runs out and that is allowed.

    Args:
        contract: What to load.
        fetch: Where the files come from; called once for each model.
        allowed: Rungs that the user allows.
        on_event: Told of every rung that is taken, and of what the monitor finds.
        progress: Told of bytes loaded.
        trust_remote_code: Lets transformers run code that a model's folder ships.
        refusal: Why the contract cannot be loaded as it is.

    Raises:
        OomproofError: As `GuardedEngine` raises it.
    """
    starter = _Starter(fetch, progress, on_event, trust_remote_code=trust_remote_code)
    with ThreadPoolExecutor(1) as beside:
        starter.beside = beside
        try:
            engine = GuardedEngine(
                Target(plan=contract.plan, spec=contract.spec),
                starter,
                hardware=contract.hardware,
                allowed=allowed,
                on_event=on_event,
                failure=None if refusal is None else judge(refusal),
            )
        finally:
            starter.beside = None
        try:
            defaults, parsing = starter.texts[key_of(engine.target)]
            tokenizer = parsing.result()
        except BaseException:
            engine.close()
            raise
    starter.texts.clear()
    return Model(engine, tokenizer, engine.plan, defaults)


def open_apart(
    contract: Contract,
    fetch: Fetch,
    *,
    allowed: Sequence[str] = (),
    on_event: OnEvent | None = None,
    progress: Loaded | None = None,
    trust_remote_code: bool = False,
    refusal: PlanDoesNotFitError | None = None,
) -> Model:
    """As `open_model`, with the model in a supervised process and the text side in this one.

    Files are fetched in this process: the other one has no network. A plan that never fitted is
    left for one that does before a process is started, and so before anything is downloaded.

    Raises:
        OomproofError: As `GuardedEngine` raises it while loading.
        WorkerError: The process died, hung, or met a fault.
        NotRunnableError: This is no POSIX system.
    """
    from oomproof.worker.engine import WorkerEngine
    from oomproof.worker.launch import Launch

    if os.name != "posix":
        raise NotRunnableError(
            f"a model's own process needs a POSIX system, this is {os.name}", remedy="--no-worker"
        )
    target = Target(plan=contract.plan, spec=contract.spec)
    if refusal is not None:
        target = _one_that_fits(target, refusal, allowed, on_event)

    def find(model: str) -> tuple[ModelSpec, Path]:
        spec = find_model(model)
        return spec, fetch(spec)

    folder = fetch(target.spec)
    engine = WorkerEngine(
        Launch(
            plan=target.plan,
            folder=folder,
            vocab_size=target.spec.vocab_size,
            trust_remote_code=trust_remote_code,
            allowed=tuple(allowed),
            find=find,
        ),
        on_event=on_event,
    )
    try:
        with ThreadPoolExecutor(1) as beside:
            # transformers is imported and the tokenizer parsed while the weights are on their way.
            parsing = beside.submit(_read_texts, folder, trust_remote_code=trust_remote_code)

            def told(done: int, total: int) -> None:
                if parsing.done():
                    # What is wrong with its files need not wait for the weights.
                    parsing.result()
                if progress is not None:
                    progress(done, total)

            engine.begin(told)
            tokenizer, defaults = parsing.result()
        if engine.folder != folder:
            tokenizer, defaults = _read_texts(engine.folder, trust_remote_code=trust_remote_code)
    except BaseException:
        engine.close()
        raise
    return Model(engine, tokenizer, engine.plan, defaults)


def _one_that_fits(
    target: Target,
    refusal: PlanDoesNotFitError,
    allowed: Sequence[str],
    on_event: OnEvent | None,
) -> Target:
    """The first rung's plan, for one that cannot be started at all.

    Raises:
        LadderExhaustedError: No allowed rung helps.
    """
    failure, machine = judge(refusal), Machine()
    assert failure is not None
    situation = Situation(
        target=target,
        failure=failure,
        hardware=machine.measure(target.plan),
        least_context=0,
        requests=0,
        has_answers=False,
        holders=machine.holders(target.plan),
        find=machine.find,
    )
    rung, proposal = Ladder(allowed).next(situation)
    event = event_of(rung, proposal, situation)
    tell_rung(event, on_event)
    return proposal.target


def _read_texts(
    folder: Path, *, trust_remote_code: bool
) -> tuple[TransformersTokenizer, GenerationDefaults]:
    defaults = read_generation_defaults(folder)
    return (
        TransformersTokenizer(folder, defaults=defaults, trust_remote_code=trust_remote_code),
        defaults,
    )


def key_of(target: Target) -> Key:
    """Which model it is: others may have its shapes, and so its fingerprint."""
    return target.plan.fingerprint, target.plan.source


class _Starter:
    """Starts engines, each watched by its plan; beside loading, a tokenizer's files are parsed."""

    def __init__(
        self,
        fetch: Fetch,
        progress: Loaded | None,
        on_event: OnEvent | None,
        *,
        trust_remote_code: bool,
    ) -> None:
        self._fetch, self._progress, self._on_event = fetch, progress, on_event
        self._trust_remote_code = trust_remote_code
        self._folders: dict[Key, Path] = {}
        self.beside: ThreadPoolExecutor | None = None
        """Where tokenizers are parsed; None once the model is there."""
        self.texts: dict[Key, tuple[GenerationDefaults, Future[TransformersTokenizer]]] = {}

    def __call__(self, target: Target, hardware: Hardware) -> Engine:
        key = key_of(target)
        if key not in self._folders:
            self._folders[key] = self._fetch(target.spec)
        folder = self._folders[key]
        contract = Contract(plan=target.plan, spec=target.spec, hardware=hardware)

        def parse() -> None:
            if self.beside is None or key in self.texts:
                return
            defaults = read_generation_defaults(folder)
            parsing = self.beside.submit(
                TransformersTokenizer,
                folder,
                defaults=defaults,
                trust_remote_code=self._trust_remote_code,
            )
            self.texts[key] = defaults, parsing

        if any(device.kind == "cpu" for device in target.plan.devices_in_use):
            # What the process grows by is measured there: transformers' import is not the model's.
            parse()
            _, parsing = self.texts.get(key, (None, None))
            if parsing is not None:
                parsing.result()
        engine = start_engine(
            contract,
            folder,
            self._progress,
            trust_remote_code=self._trust_remote_code,
            on_reading=parse,
        )
        try:
            return monitored(engine, target.plan, self._on_event)
        except BaseException:
            engine.close()
            raise
