"""What a fine-tuning did, as the command prints it and the folder keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from oomproof.evaluation.charts import Chart, Pen, linear
from oomproof.tuning.history import History

_TRAINING = Pen(colour="#56b4e9", dash="")
_MEAN = Pen(colour="#0072b2", dash="")
_VALIDATION = Pen(colour="#d55e00", dash="")


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningReport:
    """A fine-tuning, finished or interrupted."""

    model: str
    folder: str
    engine: str
    finished: bool
    """False where an interrupt ended it: the same command with --resume goes on."""
    steps: int
    """Optimizer steps that are done."""
    planned_steps: int
    resumed_from: int
    """The step of the checkpoint that it went on from, 0 where it began anew."""
    adapter_step: int
    """Whose adapter it is: the best on held-out samples, else the last."""
    loss: float | None
    """Training loss of the last step."""
    validation_before: float | None
    """Mean loss of held-out learned tokens without the adapter, nats."""
    validation_after: float | None
    """With it."""
    perplexity_before: float | None
    perplexity_after: float | None
    tokens: int
    """That this run trained on, padding left out."""
    tokens_per_second: float | None
    seconds: float
    planned_bytes: int
    """The plan's peak without the context; on a GPU without the margin too."""
    measured_bytes: int
    """What torch reserved on a GPU; on a processor the growth of the resident set."""
    exceeded_bytes: int
    """What a GPU gave beyond the plan, which is a mistake of the plan's; 0 on a processor, whose
    resident set has more in it."""
    trainable_parameters: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def loss_svg(history: History, *, before: float | None = None) -> str:
    """Training and validation loss over the steps."""
    points = list(history.training)
    held_out = ([(0, before)] if before is not None else []) + list(history.validation)
    values = [value for _, value in (*points, *held_out)] or [0.0]
    steps = [step for step, _ in (*points, *held_out)] or [0]
    chart = Chart(
        linear([0.0, float(max(steps))], "optimizer steps", low=0.0),
        linear(values, "loss, nats a token"),
    )
    if len(points) > 1:
        chart.line([(float(step), value) for step, value in points], _TRAINING)
        smooth = _smoothed(points)
        chart.line([(float(step), value) for step, value in smooth], _MEAN)
        chart.label(float(smooth[-1][0]), smooth[-1][1], "training", _MEAN)
    if held_out:
        chart.line([(float(step), float(value)) for step, value in held_out], _VALIDATION)
        chart.label(float(held_out[-1][0]), float(held_out[-1][1]), "held out", _VALIDATION)
    return chart.svg("Loss of training and of held-out samples over the steps")


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean over a tenth of the steps."""
    window = max(1, len(points) // 10)
    return [
        (
            step,
            sum(value for _, value in points[max(0, n - window + 1) : n + 1])
            / (n + 1 - max(0, n - window + 1)),
        )
        for n, (step, _) in enumerate(points)
    ]
