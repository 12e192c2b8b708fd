"""Weights for a frozen model: a checkpoint's, or random ones; all of them, or a rank's share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from oomproof.engine.native.load import refuse_another_head
from oomproof.engine.native.stored import StoredWeights
from oomproof.engine.native.weights import Parameter
from oomproof.errors import CheckpointError
from oomproof.loading.pipeline import load_checkpoint, load_random
from oomproof.loading.targets import LoadProgress, LoadReport, Target, is_computed_buffer
from oomproof.models.spec import CheckpointSpec, ModelSpec
from oomproof.tuning.sharded import ShardedLayers

Units = Sequence[Sequence[Parameter]]
"""Parameters of the embedding, of each layer, and of norm and head."""
Fill = Callable[[Units, LoadProgress | None], LoadReport]
"""Brings what belongs there to some units, or all."""
_HEAD = "lm_head.weight"


def fill_frozen(
    spec: ModelSpec,
    units: Units,
    folder: Path | None,
    *,
    device: torch.device,
    seed: int,
    progress: LoadProgress | None,
    sharded: ShardedLayers | None,
) -> LoadReport:
    """Brings the weights of a checkpoint, or random ones where there is no folder.

    Sharded, each rank reads and quantizes its share of the layers, and they hand the parts out;
    progress is of that share. What is no layer every rank reads.

    Raises:
        CheckpointError: A damaged file, or a value that is not finite.
        LoadError: Parameters missing, unexpected or mis-shaped.
        RankError: Another rank failed.
    """
    fill: Fill
    if folder is None:
        fill = partial(_make, spec, device, seed)
    elif spec.checkpoint is None:
        raise CheckpointError(str(folder), "holds no safetensors files")
    else:
        fill = _reading(spec, spec.checkpoint, units, folder, device)
    if sharded is None:
        return fill(units, progress)
    return _fill_share(fill, units, sharded, progress, item_bytes=spec.dtype.itemsize)


def _make(
    spec: ModelSpec, device: torch.device, seed: int, units: Units, progress: LoadProgress | None
) -> LoadReport:
    targets = _targets(units, None, device, made_up=True)
    names = {target.name for target in targets}
    some = replace(spec, tensors=tuple(one for one in spec.tensors if one.name in names))
    return load_random(some, targets, progress=progress, seed=seed)


def _reading(
    spec: ModelSpec, checkpoint: CheckpointSpec, units: Units, folder: Path, device: torch.device
) -> Fill:
    tied = {_HEAD} if spec.tie_word_embeddings else set()
    if tied:
        refuse_another_head(folder, checkpoint)
    quantized = spec.checkpoint_quantization
    held = StoredWeights(folder, checkpoint, quantized) if quantized else None
    known = {name for unit in units for one in unit for name in _names(one, held)} | tied

    def read(some: Units, progress: LoadProgress | None) -> LoadReport:
        targets = _targets(some, held, device, made_up=False)
        elsewhere = known - {target.name for target in targets}
        return load_checkpoint(
            folder,
            checkpoint,
            targets,
            progress=progress,
            ignored=lambda name: is_computed_buffer(name) or name in elsewhere,
        )

    return read


def _names(parameter: Parameter, held: StoredWeights | None) -> list[str]:
    """What a checkpoint has for a parameter."""
    if held is not None and parameter.placed.held.quantized:
        return [target.name for target in held.targets(parameter)]
    return [parameter.placed.spec.name]


def _targets(
    units: Units, held: StoredWeights | None, device: torch.device, *, made_up: bool
) -> list[Target]:
    parameters = [parameter for unit in units for parameter in unit]
    sizes = [parameter.placed.workspace_numel for parameter in parameters]
    workspace = torch.empty(max(sizes), dtype=torch.float32, device=device)
    targets: list[Target] = []
    for parameter in parameters:
        if held is not None and parameter.placed.held.quantized:
            targets += held.targets(parameter)
        else:
            targets.append(parameter.target(workspace, made_up=made_up))
    return targets


def _fill_share(
    fill: Fill,
    units: Units,
    sharded: ShardedLayers,
    progress: LoadProgress | None,
    *,
    item_bytes: int,
) -> LoadReport:
    first, *layers, last = units
    own = layers[sharded.ranks.rank :: sharded.ranks.size]
    sizes = [
        item_bytes * sum(parameter.placed.spec.numel for parameter in unit)
        for unit in ([*first, *last], *own)
    ]
    reports: list[LoadReport] = []

    def load(some: Units) -> None:
        told = None
        if progress is not None:
            done, part = sum(sizes[: len(reports)]), sizes[len(reports)]
            told = partial(_tell_part, progress, done, part, sum(sizes))
        reports.append(fill(some, told))

    load([first, last])
    sharded.fill(lambda layer: load([layers[layer]]))
    return replace(
        reports[0],
        bytes=sum(report.bytes for report in reports),
        seconds=sum(report.seconds for report in reports),
        tensors=sum(report.tensors for report in reports),
        pinned_bytes=max(report.pinned_bytes for report in reports),
    )


def _tell_part(
    progress: LoadProgress, done: int, part: int, total: int, here: int, all_here: int
) -> None:
    """Tells of one part of a load: bytes of a checkpoint may be other than a model's."""
    progress(done + part * here // max(1, all_here), total)
