"""`oomproof top`: lines, JSON and tables; every end of it but an error is exit code 0."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console

from oomproof.cli import render_top
from oomproof.hardware.usage import watch_gpus
from oomproof.monitoring import view as view_module
from oomproof.monitoring.events import MonitorEvent
from oomproof.monitoring.status_files import StatusFile, status_folder
from oomproof.monitoring.view import View, watch_machine
from oomproof.units import GIB, MIB
from tests.cli.invoke import invoke
from tests.hardware.fake_nvml import FakeGpu, FakeNvml
from tests.monitoring.made_up import cpu_plan, gpu_plan, status

EVENT = MonitorEvent(
    kind="leak", at=1.0, device=None, term="rss", measured_bytes=5, message="rss [bold]grows"
)
COMMAND = [sys.executable, "-c", "from oomproof.cli.main import main; main()", "top"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with this process and a stranger on it."""
    gpu = FakeGpu(
        name="NVIDIA GeForce RTX 4090",
        total_mib=24564,
        used_mib=9_390,
        computing=[(os.getpid(), 8_000), (1, 1_500)],
    )
    nvml = FakeNvml(gpus=[gpu])
    real = watch_gpus
    monkeypatch.setattr(view_module, "watch_gpus", lambda _: real(nvml))


def publish(**options: Any) -> None:
    StatusFile(status_folder()).write(status(**options))


def test_a_machine_where_nothing_runs_says_so() -> None:
    done = invoke("top", "--once")
    assert (done.code, done.err) == (0, "")
    assert "no model is running through oomproof here" in done.out
    assert "host RAM: " in done.out


@pytest.mark.usefixtures("gpus")
def test_lines_have_devices_processes_terms_and_events() -> None:
    publish(events=(EVENT,))
    out = invoke("top", "--once").out
    made = gpu_plan()
    for expected in (
        "GPU 0 NVIDIA GeForce RTX 4090: 9.77 GiB of 24.0 GiB used",
        f"pid {os.getpid()} ",
        "7.81 GiB (oomproof)",
        f"pid {os.getpid()}: llama-3.1-8b nf4-dq, native engine, 8,192 tokens × 1",
        "12 requests done in 120 steps",
        "weights",
        "100.0%",
        "torch: 5.00 GiB in tensors, 6.00 GiB reserved",
        "fragmentation 1.00 GiB, split blocks 16.0 MiB",
        "rss [bold]grows",
    ):
        assert expected in out, expected
    assert "over" not in out
    assert len([line for line in out.splitlines() if " planned" in line]) >= 6
    assert made.devices[0].name in out


@pytest.mark.usefixtures("gpus")
def test_a_term_above_its_plan_is_marked() -> None:
    terms = gpu_plan().devices[0].terms
    publish(measured=replace(terms, margin=0, workspace=terms.workspace + MIB))
    lines = invoke("top", "--once").out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("over")] == ["workspace"]


@pytest.mark.usefixtures("gpus")
def test_what_a_model_went_on_by_is_told_and_counted() -> None:
    publish(rungs={"free": 2, "kv8": 1})
    done = invoke("top", "--once")
    assert "12 requests done in 120 steps; went on by free ×2, kv8 ×1; RSS" in done.out
    [line] = invoke("top", "--once", "--json").out.splitlines()
    assert json.loads(line)["running"][0]["rungs"] == {"free": 2, "kv8": 1}


def test_on_a_processor_resident_memory_stands_against_the_plan() -> None:
    publish(made=cpu_plan())
    out = invoke("top", "--once").out
    assert "cpu (no GPU here): " in out
    assert "device cpu: RSS " in out
    assert "of model and process" in out


@pytest.mark.usefixtures("gpus")
def test_json_is_a_line_a_look_with_every_number() -> None:
    publish(events=(EVENT,))
    done = invoke("top", "--json", "--count", "3", "--interval", "0.1")
    assert (done.code, done.err) == (0, "")
    looks = [json.loads(line) for line in done.out.splitlines()]
    assert len(looks) == 3
    assert looks[0]["at"] < looks[1]["at"] < looks[2]["at"]
    last = looks[-1]
    assert last["schema"] == 1
    assert last["host"]["total_bytes"] > 0
    [gpu] = last["devices"]
    assert gpu["used_bytes"] == 10_000 * MIB
    ours = {process["pid"]: process["is_oomproof"] for process in gpu["processes"]}
    assert ours == {os.getpid(): True, 1: False}
    [running] = last["running"]
    [device] = running["devices"]
    assert device["planned"] == gpu_plan().devices[0].terms.as_dict()
    assert device["allocator"]["fragmentation_bytes"] == GIB
    assert device["is_within_plan"]
    assert running["events"][0]["message"] == EVENT.message


def test_json_of_a_machine_without_gpus_has_the_device_cpu() -> None:
    publish(made=cpu_plan())
    [look] = [json.loads(line) for line in invoke("top", "--json", "--once").out.splitlines()]
    [device] = look["devices"]
    assert device["kind"] == "cpu"
    assert device["processes"][0]["pid"] == os.getpid()
    assert device["processes"][0]["used_bytes"] == look["running"][0]["rss_bytes"] > 0


def test_a_status_that_cannot_be_read_is_told_and_hides_nothing() -> None:
    publish(made=cpu_plan())
    (status_folder() / f"{os.getpid()}-999999.json").write_text("{")
    done = invoke("top", "--once")
    assert done.code == 0
    assert "tiny" in done.out
    assert f"not readable: {os.getpid()}-999999.json: " in done.out


@pytest.mark.parametrize(
    "options",
    [
        ("--interval", "0"),
        ("--interval", "-1"),
        ("--interval", "0.01"),
        ("--interval", "nan"),
        ("--interval", "inf"),
        ("--interval", "3601"),
        ("--count", "0"),
        ("--count", "-3"),
        ("--count", "1000000001"),
        ("--once", "--count", "2"),
    ],
)
def test_options_out_of_bounds_are_refused_in_one_line(options: tuple[str, ...]) -> None:
    assert "must be from" in (error := invoke("top", *options).error) or "--once" in error


@pytest.mark.parametrize("options", [("--interval", "soon"), ("--count", "1.5"), ("one",)])
def test_what_cannot_be_parsed_is_exit_code_2(options: tuple[str, ...]) -> None:
    assert invoke("top", *options).code == 2


def test_a_home_that_is_no_folder_shows_the_devices(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("OOMPROOF_HOME", str(home / "file"))
    done = invoke("top", "--once")
    assert done.code == 0
    assert "no model is running" in done.out


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_ctrl_c_in_a_pipe_ends_it_with_exit_code_0(options: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--interval", "0.2", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX's")
def test_in_a_terminal_that_is_resized_it_draws_until_ctrl_c_and_gives_it_back() -> None:
    import fcntl
    import pty
    import struct
    import termios

    publish(made=cpu_plan())
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, "--interval", "0.2"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    os.close(theirs)
    seen = b""
    resized = False
    with suppress(OSError):  # how a pseudo-terminal says that it was closed
        while piece := os.read(ours, 65_536):
            seen += piece
            if not resized and b"weights" in seen:
                resized = True
                fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 30, 0, 0))
                time.sleep(0.7)
                process.send_signal(signal.SIGINT)
    os.close(ours)
    assert process.wait(30) == 0
    assert b"Traceback" not in seen
    assert seen.index(b"\x1b[?1049h") < seen.rindex(b"\x1b[?1049l")
    assert b"\x1b[?25h" in seen


@contextmanager
def _views(count: int) -> Iterator[Iterator[View]]:
    with watch_machine() as look:
        yield (look() for _ in range(count))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_of_any_width_gets_the_tables(width: int) -> None:
    publish(made=cpu_plan(), events=(EVENT,))
    console = Console(file=io.StringIO(), width=width, height=24, force_terminal=True)
    with patch.object(render_top, "Console", lambda **_: console), _views(2) as views:
        render_top.show_live(views)
    assert isinstance(console.file, io.StringIO)
    out = console.file.getvalue()
    assert "\x1b[?1049h" in out
    assert out.index("\x1b[?1049l") > out.index("\x1b[?1049h")
    assert "weights" in out
    assert "[bold]grows" in out


def test_a_terminal_is_given_back_when_ctrl_c_comes_in_a_look() -> None:
    def views() -> Iterator[View]:
        with watch_machine() as look:
            yield look()
            raise KeyboardInterrupt

    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    with patch.object(render_top, "Console", lambda **_: console), pytest.raises(KeyboardInterrupt):
        render_top.show_live(views())
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[?1049l" in console.file.getvalue()
    assert "\x1b[?25h" in console.file.getvalue()


def test_looking_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['oomproof', 'top', '--once']\n"
        "from oomproof.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
