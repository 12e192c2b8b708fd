"""Rules of the package as a whole: exports, lean imports, import direction, wheel, README."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import oomproof

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "accelerate", "bitsandbytes", "numpy", "huggingface_hub"}


def test_exports_are_sorted_and_each_of_them_exists() -> None:
    assert oomproof.__all__ == sorted(oomproof.__all__)
    for name in oomproof.__all__:
        assert getattr(oomproof, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = oomproof.nothing


def test_no_exported_name_is_a_modules_that_would_take_its_place() -> None:
    folder = Path(oomproof.__file__).parent
    modules = {path.stem for path in folder.iterdir()}
    assert not modules & {name for name in oomproof.__all__ if name != "__version__"}


def test_planning_a_known_model_imports_nothing_heavy() -> None:
    script = (
        "import sys, oomproof; plan = oomproof.plan('llama-3.1-405b', gpus='4xA100-80GB'); "
        "assert plan.fits; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(done.stdout.split())


def test_every_import_points_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    [built] = folder.glob("*.whl")
    return built


def test_the_wheel_brings_the_bundled_model_within_its_bound(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    folder = "oomproof/models/bundled/tiny/"
    bundled = {name: size for name, size in sizes.items() if name.startswith(folder)}
    assert folder + "model.safetensors" in bundled
    assert sum(bundled.values()) <= 8_000_000
    assert "oomproof/py.typed" in sizes
    assert "oomproof/models/catalog.json" in sizes


def test_the_wheel_brings_every_cuda_source(wheel: Path) -> None:
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.suffix in {".cu", ".cuh"}
    }
    with zipfile.ZipFile(wheel) as archive:
        assert sources <= set(archive.namelist())


@pytest.mark.timeout(300)
def test_a_bare_environment_plans_with_the_wheel_and_says_what_run_needs(
    wheel: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "bare", with_pip=True)
    scripts = tmp_path / "bare" / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([scripts / "pip", "install", "--quiet", str(wheel)], check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [scripts / "oomproof", *arguments], capture_output=True, text=True, check=False
        )

    planned = run("plan", "llama-3.1-405b", "--gpus", "4xA100-80GB", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["fits"]
    assert run("plan", "tiny").returncode == 0
    refused = run("run", "tiny", "hello")
    assert refused.returncode == 1
    assert refused.stderr == "error: torch is not installed: run: pip install 'oomproof[run]'\n"


def _readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:console|sh)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def test_the_readme_shows_targets_that_the_makefile_has() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [c.split()[1] for c in _readme_commands() if c.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(
    "command", [c for c in _readme_commands() if c.startswith("oomproof plan")]
)
def test_each_plan_that_the_readme_shows_runs(command: str, tmp_path: Path) -> None:
    _, *arguments = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-c", "from oomproof.cli.main import main; main()", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 3}, done.stderr
