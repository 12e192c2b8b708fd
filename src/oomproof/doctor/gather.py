"""The facts of this machine: every probe by itself, bounded in time, none able to fail the rest.

What may crash or hang for good (a driver's library, torch) is asked in child processes; what can
only be slow (a folder over a network) in threads that are left behind. Both go on at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar

from oomproof.doctor.facts import (
    DriverFacts,
    Facts,
    GpuFacts,
    LinkFacts,
    NvrtcFacts,
    ProbeFacts,
    SystemFacts,
    TorchFacts,
    TrialFacts,
    read_plain,
)
from oomproof.doctor.probes import local
from oomproof.doctor.probes.child import first_line
from oomproof.hardware.host import probe_host
from oomproof.hardware.probe import apple_device

T = TypeVar("T")

GPUS_LIMIT_S = 30.0
"""Without persistence mode each GPU takes a second or two to wake up."""
TORCH_LIMIT_S = 45.0
"""A first import from a cold disk takes tens of seconds."""
LOCAL_LIMIT_S = 3.0
_WITHOUT_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
"""Importing bitsandbytes then leaves torch's compiler alone, which takes a second."""
_GRACE_S = 1.0


class Gathering:
    """What the probes have answered so far: answers, errors and times by the probe's name."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.runs: list[ProbeFacts] = []

    def note(self, name: str, began_s: float, problem: str | None = None) -> None:
        """How a probe went."""
        seconds = round(time.monotonic() - began_s, 2)
        self.runs.append(ProbeFacts(name=name, seconds=seconds, problem=problem))

    def locally(
        self, name: str, ask: Callable[[], T], *, limit_s: float = LOCAL_LIMIT_S
    ) -> T | None:
        """Asks in a thread; None where it fails, or takes too long and is left behind."""
        began_s, answers, errors = time.monotonic(), [], []

        def run() -> None:
            try:
                answers.append(ask())
            except Exception as error:  # noqa: BLE001 - whatever a probe fails with is a fact
                errors.append(first_line(error))

        thread = Thread(target=run, name=f"doctor-{name}", daemon=True)
        thread.start()
        thread.join(limit_s)
        problem = errors[0] if errors else None if answers else _too_slow(limit_s)
        self.note(name, began_s, problem)
        return answers[0] if answers else None

    def read(self, name: str, kind: type[T]) -> T | None:
        """A child's answer as a value, None where there is none or it makes no sense."""
        if name not in self.answers:
            return None
        try:
            return read_plain(self.answers[name], kind)
        except ValueError as error:
            self.errors[name] = first_line(error)
            return None

    def trial(self, name: str) -> TrialFacts | None:
        """Whether what a child tried has worked, None where it was not tried."""
        if name in self.errors:
            return TrialFacts(works=False, error=self.errors[name])
        return self.read(name, TrialFacts)


class Child:
    """A process that runs some stages of probes/child.py, from now on."""

    def __init__(self, name: str, stages: Sequence[str], *, limit_s: float) -> None:
        self.name, self.stages, self.limit_s = name, stages, limit_s
        self.began_s = time.monotonic()
        # Files, not pipes: what has been written is there to read whatever becomes of the process.
        self._out = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        self._problem: str | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "oomproof.doctor.probes.child", *stages],
                stdin=subprocess.DEVNULL,
                stdout=self._out,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_WITHOUT_COMPILER},
            )
        except OSError as error:
            self._problem = first_line(error)

    def finish(self, done: Gathering) -> None:
        """Waits for it until its time is over, and takes what it has answered."""
        if self._process is not None:
            self._wait(self._process)
        self._out.seek(0)
        begun, ended = "", set()
        for line in self._out.read().decode(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                said = json.loads(line)
                begun = said["stage"]
                if "answer" in said:
                    done.answers[begun] = said["answer"]
                    ended.add(begun)
                elif "error" in said:
                    done.errors[begun] = said["error"]
                    ended.add(begun)
        self._out.close()
        if self._problem is not None:
            guilty = begun if begun and begun not in ended else self.stages[0]
            if guilty not in ended:
                done.errors[guilty] = self._problem
        done.note(self.name, self.began_s, self._problem)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        left_s = max(0.0, self.limit_s - (time.monotonic() - self.began_s))
        try:
            code = process.wait(left_s)
        except subprocess.TimeoutExpired:
            self._problem = _too_slow(self.limit_s)
            process.kill()
            # One that waits inside of the kernel does not even die.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            return
        if code < 0:
            self._problem = f"the process died of {_signal_name(-code)}"
        elif code > 0:
            self._problem = f"the process ended with {code}"


def gather(*, gpus_limit_s: float = GPUS_LIMIT_S, torch_limit_s: float = TORCH_LIMIT_S) -> Facts:
    """The facts of this machine; nothing here raises for what a check should report.

    Args:
        gpus_limit_s: How long NVIDIA's libraries may take to answer.
        torch_limit_s: How long torch and what is built on it may take.
    """
    done = Gathering()
    packages = done.locally("packages", local.read_packages) or {}
    children = [Child(name, stages, limit_s=limit_s) for name, stages, limit_s in (
        # NVML first: it is done before torch takes any of the memory that it is asked about.
        ("gpus", _gpu_stages(packages), gpus_limit_s),
        ("torch", _torch_stages(packages), torch_limit_s),
    ) if stages]  # fmt: skip
    system = done.locally("system", local.read_system)
    bus = done.locally("bus", local.read_bus) or {}
    host = done.locally("host", probe_host)
    requirements = done.locally("requirements", local.read_requirements) or ()
    environment = done.locally("environment", local.read_environment) or {}
    binaries = done.locally("binaries", local.read_binaries) or ()
    wheel = done.locally("wheel", local.read_wheel)
    cache = done.locally("cache", local.read_cache)
    xids = done.locally("kernel-log", local.read_xids)
    apple = done.locally("apple", _apple_gpus) if sys.platform == "darwin" else None
    for child in children:
        child.finish(done)

    nvml = done.answers.get("nvml", {})
    driver = nvml.get("driver", {})
    if "nvml" in done.errors:
        driver = {"nvml_error": done.errors["nvml"]}
    done.answers["driver"] = {**bus, **driver, **done.answers.get("cuda", {})}
    done.answers["gpus"], done.answers["links"] = nvml.get("gpus", ()), nvml.get("links", ())
    torch = done.read("torch", TorchFacts)
    tried = torch is not None
    return Facts(
        system=system or SystemFacts(python="", name="", machine=""),
        host=host,
        packages=packages,
        requirements=requirements,
        environment=environment,
        driver=done.read("driver", DriverFacts) or DriverFacts(),
        gpus=apple or done.read("gpus", tuple[GpuFacts, ...]) or (),
        links=done.read("links", tuple[LinkFacts, ...]) or (),
        torch=torch,
        torch_error=done.errors.get("torch"),
        triton=done.trial("triton"),
        bitsandbytes_binaries=binaries,
        four_bit=done.trial("four_bit") if tried else None,
        eight_bit=done.trial("eight_bit") if tried else None,
        flash_attention=done.trial("flash_attention") if tried else None,
        flash_attention_wheel=wheel,
        nvrtc=done.read("nvrtc", NvrtcFacts),
        nvrtc_error=done.errors.get("nvrtc"),
        cache=cache,
        xids=xids,
        probes=tuple(done.runs),
    )


def _torch_stages(packages: dict[str, str]) -> list[str]:
    if "torch" not in packages:
        return []
    stages = ["torch"]
    if "bitsandbytes" in packages:
        stages += ["four_bit", "eight_bit"]
    return stages + (["flash_attention"] if "flash-attn" in packages else [])


def _gpu_stages(packages: dict[str, str]) -> list[str]:
    stages = [] if sys.platform == "darwin" else ["nvml", "cuda"]
    if "cuda-bindings" in packages:
        stages.append("nvrtc")
    return stages + (["triton"] if "triton" in packages else [])


def _apple_gpus() -> tuple[GpuFacts, ...]:
    device = apple_device()
    if device is None:
        return ()
    return (
        GpuFacts(
            index=0,
            name=device.name,
            kind="mps",
            total_bytes=device.total_bytes,
            free_bytes=device.free_bytes,
        ),
    )


def _too_slow(limit_s: float) -> str:
    return f"no answer within {limit_s:g} s"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
