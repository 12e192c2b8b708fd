"""`oomproof explain`: what it prints, and every input that it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.invoke import invoke
from tests.postmortem.logs import card, oom

LOG = oom(
    card("15.70", "0.08", "15.48", "15.21", "0.04"),
    before="$ python chat.py --model meta-llama/Llama-3.1-8B-Instruct",
)


def test_a_pasted_traceback_is_explained_and_a_command_given() -> None:
    outcome = invoke("explain", stdin=LOG)
    assert (outcome.code, outcome.err) == (0, "")
    assert "the GPU had no room for a tensor, on GPU 0" in outcome.out
    assert "weights: of the 15.2 GiB" in outcome.out
    assert "--format int8 --context 8192" in outcome.out
    assert all(len(line) <= 120 for line in outcome.out.splitlines())


def test_the_command_that_is_given_is_one_that_plans() -> None:
    lines = invoke("explain", stdin=LOG).out.splitlines()
    [look] = [line.strip() for line in lines if line.strip().startswith("oomproof plan")]
    import shlex

    assert invoke(*shlex.split(look)[1:]).code == 0


def test_a_file_and_a_dash_are_read_alike(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_text(LOG)
    assert invoke("explain", str(file)).out == invoke("explain", "-", stdin=LOG).out


def test_json_is_the_classified_value_and_nothing_else() -> None:
    outcome = invoke("explain", "--json", stdin=LOG)
    plain = json.loads(outcome.out)
    assert outcome.err == ""
    assert plain["fault"]["class"] == "shrink-and-retry"
    assert plain["fault"]["figures"]["tried_bytes"] == 130 << 20
    assert plain["plan"]["format"] == "int8"


def test_failures_behind_the_first_are_counted() -> None:
    outcome = invoke("explain", stdin=f"{LOG}\n\nRuntimeError: CUDA error: unknown error\n{LOG}")
    assert "2 failures follow in it: 1 × unknown-cuda, 1 × gpu-memory" in outcome.out


def test_a_model_that_is_not_known_and_none_at_all_are_told_apart() -> None:
    other = invoke("explain", stdin=LOG.replace("meta-llama/Llama-3.1-8B-Instruct", "no/body"))
    assert "no/body is not in the catalog" in other.out
    assert 'oomproof plan no/body --gpus "15.70GiB"' in other.out
    none = invoke("explain", stdin=LOG.replace("--model", ""))
    assert "the text names no model" in none.out
    assert 'oomproof plan MODEL --gpus "15.70GiB"' in none.out
    nowhere = invoke(
        "explain", stdin="vllm serve a/b\ntorch.AcceleratorError: CUDA error: out of memory"
    )
    assert "does not say which GPUs" in nowhere.out


@pytest.mark.parametrize(
    ("stdin", "named"),
    [
        (b"", "stdin is empty"),
        (b"  \n\t\n", "no failure of memory"),
        (b"\0\1\2\3", "stdin is binary"),
        (b"all is well\n", "in its 1 line"),
        (b"ValueError: CUDA out of memory. is no model", "its last error is"),
    ],
)
def test_what_cannot_be_explained_is_one_line_and_exit_code_1(stdin: bytes, named: str) -> None:
    assert named in invoke("explain", stdin=stdin).error


def test_a_missing_file_and_a_folder_are_one_line_and_exit_code_1(tmp_path: Path) -> None:
    assert "there is no such file" in invoke("explain", str(tmp_path / "none.txt")).error
    assert "is a folder" in invoke("explain", str(tmp_path)).error
    assert "is empty" in invoke("explain", "/dev/null").error
    binary = tmp_path / "core"
    binary.write_bytes(b"\x7fELF\0\0\0")
    assert "is binary" in invoke("explain", str(binary)).error


def test_an_unknown_option_is_exit_code_2() -> None:
    assert invoke("explain", "--bogus").code == 2


def test_a_terminal_is_told_how_to_paste() -> None:
    outcome = invoke("explain", stdin=LOG, terminal=True)
    assert outcome.code == 0
    assert outcome.err == "paste the traceback, then press Ctrl-D on a line of its own\n"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
@pytest.mark.timeout(60)
def test_a_log_of_a_hundred_megabytes_is_read_in_bounded_memory(tmp_path: Path) -> None:
    file = tmp_path / "big.log"
    noise = (
        "INFO 10-14 12:00:47 metrics.py:233] Avg prompt throughput: 1.5 tokens/s\n" * 1_000
    ).encode()
    with file.open("wb") as stream:
        for _ in range(100_000_000 // len(noise)):
            stream.write(noise)
        stream.write(LOG.encode())
    script = (
        "import re, sys; from pathlib import Path; from oomproof.cli.main import main\n"
        "try:\n main()\nexcept SystemExit as stopped:\n code = stopped.code\n"
        "status = Path('/proc/self/status').read_text()\n"
        "sys.stderr.write(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "explain", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--format int8" in done.stdout
    assert int(done.stderr) < 100_000  # KiB


def test_explaining_imports_nothing_heavy() -> None:
    script = (
        "import sys; from oomproof.cli.main import main\n"
        "try:\n main()\nexcept SystemExit:\n pass\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'bitsandbytes', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", script, "explain"],
        input=LOG,
        text=True,
        check=True,
        capture_output=True,
    )


def test_the_output_in_the_documentation_is_what_is_printed() -> None:
    root = Path(__file__).parents[2]
    outcome = invoke("explain", str(root / "tests" / "postmortem" / "example.txt"))
    assert outcome.out in (root / "docs" / "2-running.md").read_text(encoding="utf-8")
