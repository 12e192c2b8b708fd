"""From figures of tokens to a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from oomproof.errors import NotRunnableError
from oomproof.evaluation.compare import AGREES, KL, NLL
from oomproof.evaluation.report import (
    Difference,
    EvalReport,
    FormatResult,
    LayerResult,
    PositionResult,
)
from oomproof.evaluation.run import Found, Job
from oomproof.evaluation.statistics import Bootstrap, position_bins
from oomproof.evaluation.variants import Variant
from oomproof.formats import FORMATS, DType, get_format
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
        _result(job, variant, figures, found.figures[0], layers[index], draws)
        for index, (variant, figures) in enumerate(zip(job.variants, found.figures, strict=True))
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
        differences=tuple(_differences(job, found.figures, draws)),
        histogram=found.histogram.result([one.name for one in job.variants[1:] if one.is_plain]),
        seconds=seconds,
    )


def _differences(job: Job, figures: torch.Tensor, draws: Draws) -> Iterator[Difference]:
    for later in range(2, len(job.variants)):
        for earlier in range(1, later):
            yield Difference(
                format=job.variants[later].name,
                other=job.variants[earlier].name,
                kl=draws.whole.mean(figures[later, KL].double() - figures[earlier, KL]),
            )


def refuse_overflow(job: Job, figures: torch.Tensor) -> None:
    """Refuses figures [formats, 3, tokens] of logits that are infinite or no numbers.

    Raises:
        NotRunnableError: Some are.
    """
    finite = figures.isfinite().flatten(1).all(dim=1).tolist()
    names = [one.name for one, fine in zip(job.variants, finite, strict=True) if not fine]
    if names:
        remedy = f"leave {', '.join(names)} out of --formats"
        if job.compute_dtype is DType.FLOAT16:
            remedy = "use --compute-dtype bfloat16"
        elif not finite[0]:
            remedy = "use another checkpoint of the model: this one's weights are too large"
        raise NotRunnableError(
            f"{job.spec.id} overflows in {job.compute_dtype} on this text: logits of "
            f"{', '.join(names)} are not finite",
            remedy=remedy,
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


def weight_bytes(job: Job, variant: Variant) -> tuple[int, float]:
    """(bytes of the whole model, bits of a quantized weight), as the plan counts them."""
    weight_format, compute = variant.format, job.compute_dtype
    # What float32 is only computed in takes 16 bits where the model runs.
    kept = DType.BFLOAT16 if compute is DType.FLOAT32 else compute
    if not weight_format.is_quantized:
        weight_format = get_format({DType.FLOAT16: "fp16"}.get(kept, "bf16"))
    roles = job.profile.quantized_roles
    total = bits = numel = 0
    for tensor in variant.tensors(job.spec):
        held = stored(tensor, weight_format, kept, roles)
        total += held.stored_bytes
        if tensor.role in roles and len(tensor.shape) == 2:
            bits += 8 * held.stored_bytes
            numel += tensor.numel
    return total, bits / numel


def tensors_by_format(job: Job, variant: Variant) -> dict[str, int]:
    """Format → linears that are held in it, of a mixture; nothing of any other."""
    if variant.format.by_tensor is None:
        return {}
    counts = Counter(
        variant.format.for_tensor(tensor.name).name
        for tensor in job.spec.tensors
        if tensor.role in job.profile.quantized_roles and len(tensor.shape) == 2
    )
    return dict(sorted(counts.items(), key=lambda one: FORMATS[one[0]].bits_per_weight))


def _result(
    job: Job,
    variant: Variant,
    figures: torch.Tensor,
    reference: torch.Tensor,
    layers: Sequence[LayerResult],
    draws: Draws,
) -> FormatResult:
    size, bits = weight_bytes(job, variant)
    nll = draws.whole.mean(figures[NLL])
    # Mean nats of a token → bits of a byte.
    per_byte = job.windows.tokens / job.windows.text_bytes / math.log(2)
    return FormatResult(
        format=variant.name,
        tensors=tensors_by_format(job, variant),
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
