"""The checkpoint reader: exact values, on any thread, and nothing damaged gets through."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oomproof.errors import CheckpointError
from oomproof.loading.reader import CheckpointReader
from oomproof.models.headers import read_header
from oomproof.models.spec import CheckpointSpec


def _reader(path: Path, progress: list[tuple[int, int]] | None = None) -> CheckpointReader:
    checkpoint = CheckpointSpec(
        tensors=read_header(path), files=((path.name, path.stat().st_size),)
    )

    def note(done: int, total: int) -> None:
        if progress is not None:
            progress.append((done, total))

    return CheckpointReader(path.parent, checkpoint, lambda _: torch.device("cpu"), note)


def test_values_come_back_exactly_and_progress_reaches_the_total(tmp_path: Path) -> None:
    values = {
        "a": torch.randn(33, 7).bfloat16(),
        "b": torch.arange(5, dtype=torch.int32),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "half": torch.randn(9).half(),
    }
    save_file(values, tmp_path / "model.safetensors")
    progress: list[tuple[int, int]] = []
    with _reader(tmp_path / "model.safetensors", progress).open() as tensors:
        for name, expected in values.items():
            found = tensors[name][...]
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
            assert tensors[name].get_shape() == list(expected.shape)
    assert progress[-1][0] == progress[-1][1] == sum(v.nbytes for v in values.values())


def test_tensors_read_from_eight_threads_are_not_mixed_up(tmp_path: Path) -> None:
    values = {str(i): torch.full((257, 63), float(i)) for i in range(64)}
    save_file(values, tmp_path / "model.safetensors")
    with (
        _reader(tmp_path / "model.safetensors").open() as tensors,
        ThreadPoolExecutor(max_workers=8) as pool,
    ):
        found = dict(zip(values, pool.map(lambda n: tensors[n][...], values), strict=True))
    assert all(torch.equal(found[name], expected) for name, expected in values.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(
    dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    damaged = torch.randn(300, 300).to(dtype)
    damaged[299, 299] = value
    save_file({"good": torch.ones(3), "damaged": damaged}, tmp_path / "model.safetensors")
    reader = _reader(tmp_path / "model.safetensors")

    def read_all() -> None:
        with reader.open() as tensors:
            _ = tensors["good"][...], tensors["damaged"][...]

    with pytest.raises(CheckpointError, match=r"'damaged' holds a value that is not finite"):
        read_all()


def test_a_file_that_shrank_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    reader = _reader(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends inside tensor 'a'"), reader.open() as tensors:
        _ = tensors["a"][...]
