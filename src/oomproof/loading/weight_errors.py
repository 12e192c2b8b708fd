"""How well a checkpoint's weights can be stored: measured on some rows of each, and kept.

Rows are read evenly spread over each weight, quantized and compared: what `--format fit` weighs. An
8B is 224 weights of 16 rows: 36 MB to read, some seconds of a processor's core, once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from oomproof.errors import CheckpointError
from oomproof.home import home_folder
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.models.spec import CheckpointSpec, CheckpointTensor, ModelSpec, TensorSpec
from oomproof.planning.damage import FIT_FORMATS, WeightErrors, groups_of
from oomproof.quantization.handlers import handler

SAMPLED_ROWS = 16
"""Of each weight."""
_VERSION = 2
"""Of what is kept; it changes when quantizing does."""


def measured_errors(
    folder: Path, spec: ModelSpec, environ: Mapping[str, str] = os.environ
) -> WeightErrors:
    """The errors of a model's weights in the formats that `fit` chooses from, scales searched.

    Args:
        folder: Where its files are.
        spec: The model, with the headers of its checkpoint.
        environ: Says where they are kept between plans.

    Raises:
        CheckpointError: A file is shorter than its header says, or cannot be read.
    """
    checkpoint = spec.checkpoint
    if checkpoint is None:
        raise CheckpointError(str(folder), "holds no safetensors files")
    what = (_VERSION, SAMPLED_ROWS, FIT_FORMATS)
    kept = home_folder(environ) / "weight-errors" / f"{key_of(folder, spec, checkpoint, what)}.json"
    found = read_kept(kept)
    if found is None:
        found = _measure(folder, spec, checkpoint)
        write_kept(kept, found)
    return WeightErrors(of_tensors=found, source=f"measured on {SAMPLED_ROWS} rows of each weight")


def relative_error(weight: torch.Tensor, format_name: str) -> float:
    """Squared error of a matrix in a format, scales searched, over its squared norm."""
    rows, columns = weight.shape
    held = handler(format_name, search=True)
    decoded = held.decode(held.encode(weight), (rows, columns), torch.float32)
    exact = weight.float()
    norm = float(exact.square().sum())
    return float((decoded - exact).square().sum()) / norm if norm else 0.0


def _measure(
    folder: Path, spec: ModelSpec, checkpoint: CheckpointSpec
) -> dict[str, dict[str, float]]:
    stored = {tensor.name: tensor for tensor in checkpoint.tensors}
    wanted: list[TensorSpec] = [
        tensor
        for group in groups_of(spec, QUANTIZED_ROLES["native"]).values()
        for tensor in group
        if tensor.name in stored
    ]
    return {
        tensor.name: {name: relative_error(rows, name) for name in FIT_FORMATS}
        for tensor in wanted
        for rows in [_sample(folder, stored[tensor.name])]
    }


def _sample(folder: Path, tensor: CheckpointTensor) -> torch.Tensor:
    """Rows evenly spread over a weight: [at most SAMPLED_ROWS, columns]."""
    rows, columns = tensor.shape
    dtype: torch.dtype = getattr(torch, tensor.dtype.value)
    size = columns * dtype.itemsize
    count = min(rows, SAMPLED_ROWS)
    path = folder / tensor.file
    found = bytearray()
    try:
        with path.open("rb") as file:
            for number in range(count):
                file.seek(tensor.offset_bytes + (2 * number + 1) * rows // (2 * count) * size)
                found += file.read(size)
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})") from None
    if len(found) < count * size:
        raise CheckpointError(
            str(path),
            f"ends inside tensor {tensor.name!r}",
            remedy="it is not whole; download it again",
        )
    return torch.frombuffer(found, dtype=dtype).view(count, columns)


def key_of(
    folder: Path, spec: ModelSpec, checkpoint: CheckpointSpec, what: Sequence[object]
) -> str:
    """Of the files as they are now, and of what was measured."""
    files: Sequence[tuple[str, int, int]] = [
        (name, size, (folder / name).stat().st_mtime_ns) for name, size in checkpoint.files
    ]
    whole = (*what, spec.fingerprint, str(folder.resolve()), files)
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32]


def read_kept(path: Path) -> dict[str, dict[str, float]] | None:
    """What was kept; None where nothing was, or something else."""
    from pydantic import TypeAdapter, ValidationError

    try:
        data = path.read_bytes()
        return TypeAdapter(dict[str, dict[str, float]]).validate_json(data)
    except (FileNotFoundError, ValidationError):
        return None


def write_kept(path: Path, found: Mapping[str, Mapping[str, float]]) -> None:
    """Keeps what was measured, whole or not at all."""
    # What cannot be kept is measured again the next time.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(json.dumps(found))
        fresh.replace(path)
