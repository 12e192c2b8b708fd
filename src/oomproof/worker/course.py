"""What a supervisor's workers run by now: a rung changes it, and the next worker follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from oomproof.errors import InputError, OomproofError, WorkerError
from oomproof.models.spec import ModelSource, ModelSpec
from oomproof.planning.plan import Plan
from oomproof.worker.failures import FailedError, Failure, nonsense
from oomproof.worker.launch import Launch, Limits, limits_of
from oomproof.worker.messages import Found, NotFound


class Course:
    """The launch, its limits, and what workers are held to.

    Args:
        launch: What the first worker loads.
        limits: How long to wait; None for what suits the plan of the moment.
    """

    def __init__(self, launch: Launch, limits: Limits | None) -> None:
        self.launch = launch
        self.limits = limits or limits_of(launch.plan)
        self._has_limits = limits is not None
        self._found: dict[tuple[str, ModelSource], tuple[ModelSpec, Path]] = {}
        """Smaller models that were asked for, by their fingerprints and where they come from."""
        self._first: dict[tuple[object, ...], tuple[int, ...]] = {}
        """What decides a canary's answer → the first one."""

    def follow(self, plan: Plan) -> None:
        """From here on this plan is the worker's; the next worker loads it too.

        Raises:
            FailedError: It is of a model that nobody gave to the worker.
        """
        launch = replace(self.launch, plan=plan)
        key, before = (plan.fingerprint, plan.source), self.launch.plan
        if key != (before.fingerprint, before.source):
            if key not in self._found:
                raise FailedError(nonsense("a plan of a model that it was not given"))
            spec, folder = self._found[key]
            launch = replace(launch, folder=folder, vocab_size=spec.vocab_size)
        self.launch = launch
        if not self._has_limits:
            self.limits = limits_of(plan)

    def find(self, model: str) -> Found | NotFound:
        """A smaller model's files, downloaded in this process, which has the network."""
        try:
            if self.launch.find is None or model not in self.launch.allowed:
                raise InputError(f"{model[:80]!r} is no model that was named")
            spec, folder = self.launch.find(model)
        except OomproofError as error:
            return NotFound(error=error)
        self._found[spec.fingerprint, spec.source] = spec, folder
        return Found(id=spec.id, source=spec.source, folder=str(folder.absolute()))

    def compare(self, proof: tuple[object, ...], tokens: tuple[int, ...]) -> None:
        """Holds a canary's answer against the first one that was given under the same plan.

        Args:
            proof: `Launch.proof` of that plan.
            tokens: The answer.

        Raises:
            FailedError: They differ.
        """
        first = self._first.setdefault(proof, tokens)
        if tokens != first:
            raise FailedError(
                Failure(
                    error=WorkerError(
                        f"the model's process answers its canary with {list(tokens)}, "
                        f"the first one did with {list(first)}",
                        remedy="its answers cannot be trusted; see `oomproof doctor`",
                    )
                )
            )
