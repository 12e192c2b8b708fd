"""From figures of tokens to a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from oomproof.evaluation.compare import AGREES, KL, NLL
from oomproof.evaluation.report import EvalReport, FormatResult, LayerResult, PositionResult
from oomproof.evaluation.run import Found, Job
from oomproof.evaluation.statistics import Bootstrap, position_bins
from oomproof.formats import DType, get_format
from oomproof.memory.weights import stored


def conclude(
    job: Job,
    found: Found,
    *,
    text: str,
    device: str,
    peak_bytes: int,
    seed: int,
    seconds: float,
) -> EvalReport:
    """The report of what was found.

    Args:
        job: What was evaluated.
        found: Figures of every token, and errors of every layer.
        text: Name of the text.
        device: Name of the device.
        peak_bytes: Memory that was planned.
        seed: Of the draws.
        seconds: That it took.
    """
    windows = job.windows
    draws = Draws(windows.tokens, windows.scored, seed)
    layers: list[Sequence[LayerResult]] = [(), *found.layers]
    results = [
        _result(job, name, figures, found.figures[0], layers[index], draws)
        for index, (name, figures) in enumerate(zip(job.formats, found.figures, strict=True))
    ]
    return EvalReport(
        model=job.spec.id,
        text=text,
        device=device,
        compute_dtype=str(job.compute_dtype),
        context=windows.context,
        windows=len(windows.inputs),
        tokens=windows.tokens,
        text_bytes=windows.text_bytes,
        peak_bytes=peak_bytes,
        reference=results[0],
        formats=tuple(results[1:]),
        histogram=found.histogram.result(job.formats[1:]),
        seconds=seconds,
    )


class Draws:
    """The bootstrap of all tokens, and of those of each range of positions.

    Args:
        tokens: In all.
        scored: Of a window.
        seed: Makes them repeatable.
    """

    def __init__(self, tokens: int, scored: int, seed: int) -> None:
        self.whole = Bootstrap(tokens, seed)
        self.bins: list[tuple[int, int, Bootstrap]] = [
            (first, end, Bootstrap(tokens // scored * (end - first), seed))
            for first, end in position_bins(scored)
        ]
        self.scored = scored


def weight_bytes(job: Job, format_name: str) -> tuple[int, float]:
    """(bytes of the whole model, bits of a quantized weight), as the plan counts them."""
    weight_format, compute = get_format(format_name), job.compute_dtype
    # What float32 is only computed in takes 16 bits where the model runs.
    kept = DType.BFLOAT16 if compute is DType.FLOAT32 else compute
    if not weight_format.is_quantized:
        weight_format = get_format({DType.FLOAT16: "fp16"}.get(kept, "bf16"))
    roles = job.profile.quantized_roles
    total = bits = numel = 0
    for tensor in job.spec.tensors:
        held = stored(tensor, weight_format, kept, roles)
        total += held.stored_bytes
        if tensor.role in roles and len(tensor.shape) == 2:
            bits += 8 * held.stored_bytes
            numel += tensor.numel
    return total, bits / numel


def _result(
    job: Job,
    name: str,
    figures: torch.Tensor,
    reference: torch.Tensor,
    layers: Sequence[LayerResult],
    draws: Draws,
) -> FormatResult:
    size, bits = weight_bytes(job, name)
    nll = draws.whole.mean(figures[NLL])
    # Mean nats of a token → bits of a byte.
    per_byte = job.windows.tokens / job.windows.text_bytes / math.log(2)
    return FormatResult(
        format=name,
        bits_per_weight=bits,
        weight_bytes=size,
        perplexity=nll.exponential(),
        bits_per_byte=nll.scaled(per_byte),
        added_bits_per_byte=draws.whole.mean(figures[NLL].double() - reference[NLL]).scaled(
            per_byte
        ),
        kl=draws.whole.mean(figures[KL]),
        agreement=draws.whole.mean(figures[AGREES]),
        positions=tuple(_positions(figures, draws)),
        layers=tuple(layers),
    )


def _positions(figures: torch.Tensor, draws: Draws) -> list[PositionResult]:
    found = []
    windows = figures.view(len(figures), -1, draws.scored)
    for first, end, bootstrap in draws.bins:
        part = windows[:, :, first:end].reshape(len(figures), -1)
        found.append(
            PositionResult(
                first=first,
                end=end,
                tokens=part.shape[1],
                bits_per_token=bootstrap.mean(part[NLL]).scaled(1 / math.log(2)),
                kl=bootstrap.mean(part[KL]),
                agreement=bootstrap.mean(part[AGREES]),
            )
        )
    return found
