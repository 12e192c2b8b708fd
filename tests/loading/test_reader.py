"""The checkpoint reader: exact values, on any thread, and nothing damaged gets through."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from oomproof.errors import CheckpointError
from oomproof.loading.reader import CheckpointReader
from oomproof.models.headers import read_header
from oomproof.models.spec import CheckpointSpec, CheckpointTensor


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


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
def test_every_element_type_of_safetensors_is_read_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    values = torch.tensor([[0.0, 1.0, -1.0], [2.5, -0.0, 100.0]]).to(dtype)
    save_file({"a": values, "scalar": values[1, 2].clone()}, tmp_path / "model.safetensors")
    with _reader(tmp_path / "model.safetensors").open() as tensors:
        for name, expected in {"a": values, "scalar": values[1, 2].clone()}.items():
            found = tensors[name][...]
            assert (found.dtype, found.shape) == (dtype, expected.shape)
            assert found.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))
        with safe_open(tmp_path / "model.safetensors", "pt") as theirs:
            assert tensors["a"].get_dtype() == theirs.get_slice("a").get_dtype()


def test_a_part_of_a_tensor_is_what_its_index_says(tmp_path: Path) -> None:
    values = torch.arange(20.0).reshape(4, 5)
    save_file({"a": values}, tmp_path / "model.safetensors")
    with _reader(tmp_path / "model.safetensors").open() as tensors:
        assert torch.equal(tensors["a"][:], values)
        assert torch.equal(tensors["a"][1:3], values[1:3])
        assert torch.equal(tensors["a"][1:3, :2], values[1:3, :2])


def test_large_tensors_are_read_in_buffers_and_progress_only_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oomproof.loading.reader.STAGING_BUFFER_BYTES", 1000)
    values = {"a": torch.randn(501, 3), "b": torch.randn(7), "c": torch.randn(1000)}
    save_file(values, tmp_path / "model.safetensors")
    progress: list[tuple[int, int]] = []
    with _reader(tmp_path / "model.safetensors", progress).open() as tensors:
        assert all(torch.equal(tensors[name][...], value) for name, value in values.items())
    done = [count for count, _ in progress]
    total = sum(value.nbytes for value in values.values())
    assert len(done) == 7 + 1 + 4
    assert done == sorted(done)
    assert {shown for _, shown in progress} == {total}
    assert done[-1] == total


def test_threads_that_read_several_shards_get_their_own_tensors(tmp_path: Path) -> None:
    values = {f"{shard}.{i}": torch.randn(61, 97) for shard in range(4) for i in range(16)}
    tensors: list[CheckpointTensor] = []
    for shard in range(4):
        path = tmp_path / f"model-{shard}.safetensors"
        save_file({n: v for n, v in values.items() if n.startswith(f"{shard}.")}, path)
        tensors += read_header(path)
    progress: list[int] = []
    reader = CheckpointReader(
        tmp_path,
        CheckpointSpec(tensors=tuple(tensors), files=()),
        lambda _: torch.device("cpu"),
        lambda done, _: progress.append(done),
    )
    names = list(values) * 4
    with reader.open() as lazy, ThreadPoolExecutor(max_workers=8) as pool:
        found = list(pool.map(lambda name: lazy[name][...], names))
    assert all(torch.equal(a, values[name]) for a, name in zip(found, names, strict=True))
    assert progress[-1] == 4 * sum(value.nbytes for value in values.values())


def test_the_error_names_the_shard_that_holds_the_damage(tmp_path: Path) -> None:
    tensors: list[CheckpointTensor] = []
    for name, value in {"good": 1.0, "bad": float("nan")}.items():
        save_file({name: torch.full((5,), value)}, tmp_path / f"{name}.safetensors")
        tensors += read_header(tmp_path / f"{name}.safetensors")
    checkpoint = CheckpointSpec(tensors=tuple(tensors), files=())
    reader = CheckpointReader(tmp_path, checkpoint, lambda _: torch.device("cpu"))

    def read_all() -> None:
        with reader.open() as lazy:
            _ = lazy["good"][...], lazy["bad"][...]

    with pytest.raises(CheckpointError) as refused:
        read_all()
    assert refused.value.file == str(tmp_path / "bad.safetensors")


def test_damage_in_a_long_checkpoint_is_found_before_all_of_it_is_read(tmp_path: Path) -> None:
    values = {f"{i:03}": torch.ones(3) for i in range(200)}
    values["000"] = torch.tensor([1.0, float("inf"), 1.0])
    save_file(values, tmp_path / "model.safetensors")
    progress: list[tuple[int, int]] = []

    def read_all() -> None:
        with _reader(tmp_path / "model.safetensors", progress).open() as tensors:
            for name in values:
                _ = tensors[name][...]

    with pytest.raises(CheckpointError, match="tensor '000' holds a value that is not finite"):
        read_all()
    done, total = progress[-1]
    assert done < total / 2


def test_the_largest_finite_values_are_no_damage(tmp_path: Path) -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    values = {str(dtype): torch.tensor([torch.finfo(dtype).max], dtype=dtype) for dtype in dtypes}
    save_file(values, tmp_path / "model.safetensors")
    with _reader(tmp_path / "model.safetensors").open() as tensors:
        assert all(torch.equal(tensors[name][...], value) for name, value in values.items())


def test_a_shard_that_is_gone_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    reader = _reader(path)
    path.unlink()
    with (
        pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"),
        reader.open() as tensors,
    ):
        _ = tensors["a"][...]


def test_files_are_closed_whether_reading_ends_well_or_not(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.tensor(float("nan"))}, tmp_path / "m.safetensors")

    def read(name: str) -> None:
        with _reader(tmp_path / "m.safetensors").open() as tensors:
            _ = tensors[name][...]

    opened = len(list(Path("/proc/self/fd").iterdir()))
    read("a")
    with pytest.raises(CheckpointError):
        read("b")
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
