"""The walk: every window through the embedding, through layer after layer, to the logits.

For each layer its weights are read once and quantized into one format after the other; all windows
pass through each before the next. So the 16-bit reference is computed where only a layer of it
fits, and every format sees the same weights and the same windows. Logits are compared a few tokens
at a time and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from oomproof.evaluation.compare import compare
from oomproof.evaluation.decoder import WindowDecoder
from oomproof.evaluation.levels import HistogramCounter
from oomproof.evaluation.needs import FIGURES, LOGITS_BYTES
from oomproof.evaluation.report import LayerResult
from oomproof.evaluation.stored_folder import StreamedFolder
from oomproof.evaluation.streamed import StreamedWeights
from oomproof.evaluation.variants import Variant
from oomproof.evaluation.windows import Windows
from oomproof.formats import DType
from oomproof.memory.profiles import EngineProfile
from oomproof.models.forward import ForwardSpec
from oomproof.models.spec import ModelSpec, Role

Told = Callable[[int, int], None]
"""Called with (bytes of the checkpoint done with, bytes in all)."""
Ends = tuple[torch.Tensor, torch.Tensor]
"""The last norm, and the head, which is the embedding where they are tied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is evaluated, where."""

    spec: ModelSpec
    forward: ForwardSpec
    folder: Path
    windows: Windows
    variants: tuple[Variant, ...]
    """The reference first."""
    compute_dtype: DType
    device: torch.device
    profile: EngineProfile
    states_on_device: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the walk found."""

    figures: torch.Tensor
    """float32 [formats, 3, tokens] on the CPU; see compare."""
    layers: tuple[tuple[LayerResult, ...], ...]
    """Of each format but the reference."""
    histogram: HistogramCounter


class Walk:
    """An evaluation in progress.

    Args:
        job: What is evaluated.
        told: Told after each unit.
    """

    def __init__(self, job: Job, told: Told | None = None) -> None:
        self._job, self._told = job, told
        self._weights = StreamedWeights(
            job.spec, job.folder, job.variants, job.compute_dtype, job.device, job.profile
        )
        self._folders = {
            index: StreamedFolder(one, job.compute_dtype, job.device, job.profile)
            for index, one in enumerate(job.variants)
            if one.stored is not None
        }
        self._decoder = WindowDecoder(
            job.spec,
            job.forward,
            context=job.windows.context,
            compute_dtype=job.compute_dtype,
            device=job.device,
        )
        dtype: torch.dtype = getattr(torch, job.compute_dtype)
        count, context = len(job.windows.inputs), job.windows.context
        place = job.device if job.states_on_device else torch.device("cpu")
        size = (len(job.variants), count, context, job.spec.hidden_size)
        self._states = torch.empty(size, dtype=dtype, device=place)
        self._histogram = HistogramCounter(job.device)
        self._layers: list[list[LayerResult]] = [[] for _ in job.variants[1:]]
        self._done_bytes = 0

    def run(self) -> Found:
        """Everything.

        Raises:
            CheckpointError, LoadError: As load_checkpoint.
        """
        with torch.inference_mode():
            self._embed()
            for layer in range(self._job.spec.num_hidden_layers):
                self._pass_layer(layer)
            figures = self._score()
        layers = tuple(tuple(one) for one in self._layers)
        return Found(figures=figures, layers=layers, histogram=self._histogram)

    def _read(self, unit: int) -> None:
        self._weights.read(unit)

    def _tell(self, unit: int) -> None:
        self._done_bytes += self._weights.unit_bytes[unit]
        if self._told is not None:
            self._told(self._done_bytes, sum(self._weights.unit_bytes))

    def _embed(self) -> None:
        self._read(0)
        self._embed_by(self._weights.plain(0, Role.EMBEDDING), self._states)
        for index, folder in self._folders.items():
            folder.read(0)
            self._embed_by(folder.plain(Role.EMBEDDING), self._states[index : index + 1])
        self._tell(0)

    def _embed_by(self, table: torch.Tensor, states: torch.Tensor) -> None:
        """Writes every window's embeddings to states [variants, windows, context, hidden]."""
        job = self._job
        for number, tokens in enumerate(job.windows.inputs):
            rows = table[torch.tensor(tokens, device=job.device)]
            if job.forward.embedding_multiplier != 1:
                rows.mul_(job.forward.embedding_multiplier)
            states[:, number] = rows.to(states.device)

    def _pass_layer(self, layer: int) -> None:
        unit = layer + 1
        self._read(unit)
        self._weights.count(unit, self._histogram)
        for index, variant in enumerate(self._job.variants):
            folder = self._folders.get(index)
            if folder is None:
                weights, block = self._weights.layer(unit, variant)
            else:
                block = folder.read(unit)
                weights = folder.layer()
            sums = torch.zeros(2, dtype=torch.float64, device=self._job.device)
            for number in range(len(self._job.windows.inputs)):
                states = self._window(index, number)
                self._decoder.run(layer, weights, states)
                if index:
                    reference = self._window(0, number).float()
                    sums[1] += reference.square().sum()
                    sums[0] += (states.float() - reference).square_().sum()
                self._keep(index, number, states)
            if index:
                errors = self._weights.errors(block, None if folder is None else folder.memory)
                self._layers[index - 1].append(
                    LayerResult(
                        layer=layer,
                        weight_error=_relative(
                            sum(error for error, _ in errors.values()),
                            sum(whole for _, whole in errors.values()),
                        ),
                        hidden_error=_relative(float(sums[0]), float(sums[1])),
                        linears={name: _relative(*pair) for name, pair in errors.items()},
                    )
                )
        self._tell(unit)

    def _score(self) -> torch.Tensor:
        job, windows = self._job, self._job.windows
        last = job.spec.num_hidden_layers + 1
        ends = self._ends(last)
        figures = torch.empty(len(job.variants), FIGURES, windows.tokens)
        step = max(1, min(windows.scored, LOGITS_BYTES // (4 * job.spec.vocab_size)))
        skipped = windows.context - windows.scored
        for number, targets in enumerate(windows.targets):
            wanted = torch.tensor(targets, device=job.device)
            for first in range(0, windows.scored, step):
                end = min(first + step, windows.scored)
                out = torch.empty(len(job.variants), FIGURES, end - first, device=job.device)
                compare(
                    self._logits(number, skipped + first, skipped + end, ends),
                    wanted[first:end],
                    list(out),
                )
                begin = number * windows.scored
                figures[:, :, begin + first : begin + end] = out.cpu()
        self._tell(last)
        return figures

    def _ends(self, last: int) -> list[Ends]:
        """The last norm and the head of each variant."""
        spec, weights = self._job.spec, self._weights
        self._read(last)
        norm = weights.plain(last, Role.NORM)
        if spec.tie_word_embeddings:
            norm = norm.clone()
            self._read(0)
            own = norm, weights.plain(0, Role.EMBEDDING)
        else:
            own = norm, weights.plain(last, Role.HEAD)
        found = [own] * len(self._job.variants)
        for index, folder in self._folders.items():
            folder.read(last)
            norm = folder.plain(Role.NORM)
            if spec.tie_word_embeddings:
                norm = norm.clone()
                folder.read(0)
            head = Role.EMBEDDING if spec.tie_word_embeddings else Role.HEAD
            found[index] = norm, folder.plain(head)
        return found

    def _logits(
        self, number: int, first: int, end: int, ends: Sequence[Ends]
    ) -> Iterator[torch.Tensor]:
        divisor = self._job.forward.logits_divisor
        for index, (norm, head) in enumerate(ends):
            states = self._states[index, number, first:end].to(self._job.device)
            logits = torch.mm(self._decoder.normalised(states, norm), head.t()).float()
            yield logits if divisor == 1 else logits.div_(divisor)

    def _window(self, index: int, number: int) -> torch.Tensor:
        return self._states[index, number].to(self._job.device)

    def _keep(self, index: int, number: int, states: torch.Tensor) -> None:
        """Back to where they wait; in place where they wait on the device."""
        if not self._job.states_on_device:
            self._states[index, number].copy_(states)


def _relative(squared_error: float, squared: float) -> float:
    return (squared_error / squared) ** 0.5 if squared else 0.0
