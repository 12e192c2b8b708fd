"""Checkpoints that are pickles: refused, or with --allow-pickle made into safetensors apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oomproof.conversion import unpickle
from oomproof.errors import CheckpointError, ModelNotFoundError
from oomproof.models.pickled import environment, unpickled
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.session import load, plan, quantize
from tests.cli.invoke import invoke
from tests.compat.checkpoints import copy_of_tiny, edit_json, random_checkpoint

PROMPT = "It was a dark night"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8}
PICKLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def pickle_of(folder: Path, source: Path | None = None, **options: Any) -> Path:
    """The model with its weights in one pickle."""
    shutil.copytree(source or bundled_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / PICKLE, **options)
    return folder


def pickles_of(folder: Path, count: int = 3) -> Path:
    copy_of_tiny(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(count):
        file = f"pytorch_model-{number + 1:05}-of-{count:05}.bin"
        part = {name: tensors[name] for name in names[number::count]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def with_content(folder: Path, content: object) -> Path:
    copy_of_tiny(folder)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / PICKLE)
    return folder


def kept_in(home: Path) -> list[Path]:
    return list((home / "unpickled").iterdir()) if (home / "unpickled").exists() else []


def tensors_in(folder: Path) -> Tensors:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def test_without_the_option_the_refusal_names_it_and_says_what_it_does(tmp_path: Path) -> None:
    folder = pickle_of(tmp_path / "model")
    message = r"can run code .* --allow-pickle: another process then reads its tensors and nothing"
    with pytest.raises(CheckpointError, match=message):
        plan(folder)


@pytest.mark.parametrize("make", [pickle_of, pickles_of])
def test_with_it_the_model_is_the_one_in_safetensors(
    make: Callable[[Path], Path], tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened in this process")

    monkeypatch.setattr(torch, "load", never)
    spec = resolve(str(folder), allow_pickle=True)
    assert spec.id == str(folder)
    assert spec.fingerprint == resolve("tiny").fingerprint
    made = Path(spec.source.path)
    assert made.parent == home / "unpickled"
    expected = load_file(bundled_folder() / "model.safetensors")
    found = tensors_in(made)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list(made.glob("*.bin*"))
    with load("tiny") as model:
        answer = model.generate(PROMPT, **GREEDY)
    with load(folder, allow_pickle=True) as model:
        assert model.generate(PROMPT, **GREEDY) == answer
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert kept_in(home) == [made]


def test_it_is_converted_once_until_a_file_changes(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pickle_of(tmp_path / "model")
    first = unpickled(folder)
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("converted again"))
        assert unpickled(folder) == first
    edit_json(folder / "config.json", max_position_embeddings=128)
    os.utime(folder / "config.json", ns=(1, 1))
    again = unpickled(folder)
    assert again != first
    assert resolve(str(folder), allow_pickle=True).max_position_embeddings == 128
    os.utime(folder / PICKLE, ns=(1, 1))
    assert unpickled(folder) not in (first, again)


def test_a_folder_with_safetensors_stays_as_it_is(tmp_path: Path, home: Path) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    (folder / PICKLE).write_bytes(b"never looked at")
    assert unpickled(folder) == folder
    assert resolve(str(folder), allow_pickle=True).source.path == str(folder)
    assert not kept_in(home)
    with pytest.raises(ModelNotFoundError):
        unpickled(tmp_path / "nothing")


def test_tensors_that_share_memory_are_written_each_for_itself(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", "llama, tied")
    tensors = load_file(source / "model.safetensors")
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    whole = torch.cat([tensors.pop(f"model.layers.0.mlp.{n}_proj.weight") for n in ("gate", "up")])
    gate, up = whole.chunk(2)
    tensors |= {
        "model.layers.0.mlp.gate_proj.weight": gate,
        "model.layers.0.mlp.up_proj.weight": up,
        "model.layers.1.mlp.down_proj.weight": (
            tensors["model.layers.1.mlp.down_proj.weight"].t().contiguous().t()
        ),
    }
    torch.save(tensors, folder / PICKLE)
    found = tensors_in(unpickled(folder))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with load(source) as model:
        answer = model.generate(PROMPT, **GREEDY)
    with load(folder, allow_pickle=True) as model:
        assert model.generate(PROMPT, **GREEDY) == answer


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path: Path, home: Path) -> None:
    touched = tmp_path / "touched"
    tensors = load_file(bundled_folder() / "model.safetensors")
    folder = with_content(tmp_path / "model", {**tensors, "evil": Evil(touched)})
    with pytest.raises(CheckpointError, match=r"holds more than tensors \((posix|nt)\.system\)"):
        unpickled(folder)
    assert not touched.exists()
    assert not kept_in(home)
    done = invoke("run", str(folder), PROMPT, "--allow-pickle")
    assert "can run code, and is not opened" in done.error
    assert not touched.exists()


def too_wide() -> torch.Tensor:
    return torch.zeros(1).expand(1 << 40)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"a": {"b": torch.zeros(2)}}, "holds dict 'a', which is no tensor"),
        ({1: torch.zeros(2)}, "holds something under the name 1"),
        ({"__metadata__": torch.zeros(2)}, "under the name '__metadata__'"),
        ({}, "holds no tensors by name"),
        (torch.zeros(2), "holds no tensors by name"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "tensor 'a' is torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is torch.float32, torch.sparse_coo|holds more than"),
        ({"a": too_wide()}, r"its tensors would take 4,096\.0 GiB"),
    ],
)
def test_what_is_no_state_dict_is_refused(content: object, problem: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / PICKLE)
    with pytest.raises(CheckpointError, match=problem):
        unpickle.load(tmp_path / PICKLE)


def test_torchs_old_format_and_damaged_files_are_refused(tmp_path: Path, home: Path) -> None:
    old = pickle_of(tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"not in the format that torch\.save writes since"):
        unpickle.load(old / PICKLE)
    cut = pickle_of(tmp_path / "cut")
    os.truncate(cut / PICKLE, 1_000_000)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: cannot be read"):
        unpickled(cut)
    assert not kept_in(home)


def test_an_index_is_read_strictly(tmp_path: Path, home: Path) -> None:
    folder = pickles_of(tmp_path / "model")
    missing = "pytorch_model-00002-of-00003.bin"
    (folder / missing).rename(folder / "elsewhere.bin")
    with pytest.raises(CheckpointError, match=rf"{missing}: is missing, {INDEX} names it"):
        unpickled(folder)
    for file, problem in (("../a.bin", "leaves the folder"), ("a.pt", r"no.* plain \*\.bin")):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(CheckpointError, match=problem):
            unpickled(folder)
    assert not kept_in(home)


def test_a_disk_that_is_too_small_is_foretold(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pickle_of(tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("began"))
    with pytest.raises(
        CheckpointError, match=r"needs 7\.\d+ MiB in .* has 1\.00 MiB free: free some"
    ):
        unpickled(folder)


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, home: Path) -> None:
    folder = pickle_of(tmp_path / "model")

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpickled(folder, interrupt)
    assert not kept_in(home)
    left = home / "unpickled" / f".{'0' * 32}.4194305.x"
    left.mkdir()
    os.utime(left, (1, 1))
    young = home / "unpickled" / f".{'1' * 32}.4194305.x"
    young.mkdir()
    seen: list[tuple[int, int]] = []
    made = unpickled(folder, lambda done, total: seen.append((done, total)))
    assert set(kept_in(home)) == {made, young}
    assert seen[-1][0] > 0.9 * seen[-1][1]


def test_the_child_has_no_tokens_and_no_gpu() -> None:
    found = environment({"PATH": "/bin", "HF_TOKEN": "secret", "LD_PRELOAD": "x", "LANG": "C"})
    assert found.keys().isdisjoint({"HF_TOKEN", "LD_PRELOAD"})
    assert (found["PATH"], found["LANG"], found["CUDA_VISIBLE_DEVICES"]) == ("/bin", "C", "")


def test_the_child_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    folder = pickle_of(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "oomproof.conversion.unpickle", str(out), str(folder / PICKLE)],
        stdin=subprocess.DEVNULL,
        env=environment(os.environ),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert b"done" not in done.stdout


def test_a_child_that_dies_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pickle_of(tmp_path / "model")
    for script, ended in (
        ("import os; os.kill(os.getpid(), 9)", "ended with signal 9"),
        ("import sys; print('x'); sys.exit('boom')", "ended with exit code 1: 'boom'"),
        ("print('[1]')", "ended with exit code 0"),
    ):
        start = subprocess.Popen

        def other(command: list[str], script: str = script, **options: Any) -> Any:
            return start([command[0], "-c", script], **options)  # noqa: B023

        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "Popen", other)
            with pytest.raises(CheckpointError, match=ended):
                unpickled(folder)


def test_it_is_quantized_too(tmp_path: Path) -> None:
    folder = pickle_of(tmp_path / "model")
    quantize("tiny", tmp_path / "expected", device="cpu")
    quantize(folder, tmp_path / "found", device="cpu", allow_pickle=True)
    expected, found = tensors_in(tmp_path / "expected"), tensors_in(tmp_path / "found")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "command", ["run", "chat", "bench", "eval", "quantize", "plan", "rehearse"]
)
def test_every_command_that_reads_a_folder_has_the_option(command: str) -> None:
    assert "--allow-pickle" in invoke(command, "--help").out
