"""Targets for tests of the loader, and the checkpoints to load into them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oomproof.errors import CheckpointError
from oomproof.formats import DType
from oomproof.loading.pipeline import Limits, LoadReport, Target, load_checkpoint, load_random
from oomproof.loading.slices import DEFAULT_LIMITS
from oomproof.models.headers import read_header
from oomproof.models.spec import (
    AttentionSpec,
    CheckpointSpec,
    CheckpointTensor,
    ModelSource,
    ModelSpec,
    Role,
    TensorSpec,
)

CPU = torch.device("cpu")
SMALL = Limits(piece_bytes=1000, slice_bytes=3000)


def keep_nothing(values: torch.Tensor, row: int) -> None:
    """A store for plans that are never carried out."""


def write_checkpoint(folder: Path, *shards: dict[str, torch.Tensor]) -> CheckpointSpec:
    """Writes each dict as a shard and reads their headers."""
    tensors: list[CheckpointTensor] = []
    files: list[tuple[str, int]] = []
    for index, shard in enumerate(shards):
        path = folder / f"model-{index:05}.safetensors"
        save_file(shard, path)
        tensors += read_header(path)
        files.append((path.name, path.stat().st_size))
    return CheckpointSpec(tensors=tuple(tensors), files=tuple(files))


def reader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("oomproof-read")]


class Receiver:
    """Targets that put slices together again, and note in which order they came."""

    def __init__(
        self, values: dict[str, torch.Tensor], *, device: torch.device = CPU, multiple: int = 1
    ) -> None:
        self.slices: dict[str, list[tuple[int, int]]] = {name: [] for name in values}
        self.finished: list[str] = []
        self.found = {n: torch.zeros_like(v, device=device) for n, v in values.items()}
        self.targets = [self._target(name, device, multiple) for name in values]

    def _target(self, name: str, device: torch.device, multiple: int) -> Target:
        final = self.found[name]

        def store(values: torch.Tensor, row: int) -> None:
            assert name not in self.finished
            assert (values.dtype, values.device) == (final.dtype, final.device)
            if final.dim():
                assert values.shape[1:] == final.shape[1:]
                final[row : row + len(values)].copy_(values)
                self.slices[name].append((row, len(values)))
            else:
                final.copy_(values)
                self.slices[name].append((row, 1))

        return Target(
            name=name,
            shape=tuple(final.shape),
            device=device,
            store=store,
            finish=lambda: self.finished.append(name),
            rows_multiple=multiple,
        )

    def check(self, values: dict[str, torch.Tensor]) -> None:
        for name, expected in values.items():
            assert same_bits(self.found[name], expected)
        assert sorted(self.finished) == sorted(values)


class Places:
    """Targets whose final tensors need no conversion."""

    def __init__(self, values: dict[str, torch.Tensor], *, device: torch.device = CPU) -> None:
        self.found = {n: torch.zeros_like(v, device=device) for n, v in values.items()}
        self.targets = [
            Target(
                name=name,
                shape=tuple(place.shape),
                device=device,
                store=never_stored,
                place=torch.nn.Parameter(place),
            )
            for name, place in self.found.items()
        ]


def never_stored(values: torch.Tensor, row: int) -> None:
    """The store of a target whose place takes the bytes as they are."""
    pytest.fail("a tensor with a place of its dtype was stored")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and bits[0].equal(bits[1])


def mixed_values() -> dict[str, torch.Tensor]:
    """Every type that a checkpoint of weights may have, of odd sizes."""
    return {
        "b16": torch.randn(331, 7).bfloat16(),
        "f8": torch.randn(13).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "f16": torch.randn(9, 5, 3).half(),
        "empty": torch.empty(0, 4),
        "f64": torch.randn(21, 11, dtype=torch.float64),
        "f8.e5": torch.randn(131, 3).to(torch.float8_e5m2),
        "f32": torch.randn(1000),
    }


def tiny_spec(shapes: dict[str, tuple[tuple[int, ...], Role]]) -> ModelSpec:
    return ModelSpec(
        id="tiny",
        source=ModelSource(kind="catalog", path="tiny"),
        architecture="LlamaForCausalLM",
        family="llama",
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=8,
        max_position_embeddings=8,
        tie_word_embeddings=False,
        dtype=DType.BFLOAT16,
        attention=(AttentionSpec(num_key_value_heads=1, key_head_dim=8, value_head_dim=8),),
        tensors=tuple(
            TensorSpec(name=name, shape=shape, role=role) for name, (shape, role) in shapes.items()
        ),
    )


RANDOM_SPEC = tiny_spec(
    {
        "embed.weight": ((501, 33), Role.EMBEDDING),
        "norm.weight": ((33,), Role.NORM),
        "q.weight": ((97, 33), Role.LINEAR),
        "q.bias": ((97,), Role.BIAS),
    }
)


def random_weights(
    seed: int = 0,
    *,
    kind: type[Receiver | Places] = Receiver,
    device: torch.device = CPU,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    empty = {t.name: torch.empty(t.shape, dtype=torch.bfloat16) for t in RANDOM_SPEC.tensors}
    receiver = kind(empty, device=device)
    report = load_random(RANDOM_SPEC, receiver.targets, seed=seed, limits=limits)
    return receiver.found, report


def check_damage_is_refused(
    folder: Path,
    kind: type[Receiver | Places],
    dtype: torch.dtype,
    value: float,
    device: torch.device,
) -> None:
    largest = torch.finfo(dtype).max
    good = {"good": torch.tensor([largest, -largest], dtype=dtype)}
    bad = {"damaged": torch.randn(3001).to(dtype), "later": torch.full((3,), value, dtype=dtype)}
    bad["damaged"][3000] = value
    checkpoint = write_checkpoint(folder, good, bad)
    targets = kind(good | bad, device=device).targets
    with pytest.raises(
        CheckpointError, match=r"'damaged' holds a value that is not finite: the checkpoint is dam"
    ) as refused:
        load_checkpoint(folder, checkpoint, targets, limits=SMALL)
    assert refused.value.file == str(folder / "model-00001.safetensors")
