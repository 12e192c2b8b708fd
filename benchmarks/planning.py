"""How long planning takes: every catalog model as a command, and the solver by itself.

    python benchmarks/planning.py [--repeat N] > results.jsonl

Commands are timed from the start of the process to its end, on machines that fit and that do not.
The solver is timed at 8 devices and 126 layers: equal cards, and eight different ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

from oomproof.hardware.describe import describe
from oomproof.models.catalog import names
from oomproof.models.resolve import resolve
from oomproof.planning.notes import Notes
from oomproof.planning.offload import place_streaming
from oomproof.planning.placement import can_place, place_fastest
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import Planner
from oomproof.planning.shortfall import least_shortfall

MACHINES = ("8xA100-80GB", "8x24GiB", "2x24GiB,1x12GiB")
LARGEST = "llama-3.1-405b"
SOLVER_MACHINES = {
    "8 equal, fits": ("8xA100-80GB", "nf4-dq"),
    "8 equal, does not fit": ("8xA100-80GB", "bf16"),
    "8 different, fits": ("24GiB,32GiB,40GiB,48GiB,31GiB,36GiB,44GiB,27GiB", "nf4-dq"),
    "8 different names, fits": (
        "RTX 4090,RTX 3090,A100-40GB,A6000,RTX 5090,L40S,V100-32GB,T4",
        "nf4-dq",
    ),
    "8 different, does not fit by little": (
        "24GiB,22GiB,20GiB,21GiB,31GiB,36GiB,14GiB,27GiB",
        "nf4-dq",
    ),
    "8 different, does not fit by far": (
        "24GiB,22GiB,20GiB,21GiB,31GiB,36GiB,14GiB,27GiB",
        "bf16",
    ),
}


def commands(repeat: int) -> None:
    """Times `oomproof plan` for each model and machine."""
    for machine in MACHINES:
        for name in names():
            command = [sys.executable, "-c", "from oomproof.cli.main import main; main()"]
            seconds = [
                _timed(
                    lambda: subprocess.run(
                        [*command, "plan", name, "--gpus", machine, "--json"],  # noqa: B023
                        check=False,
                        capture_output=True,
                    )
                )
                for _ in range(repeat)
            ]
            _print(what="command", model=name, machine=machine, seconds=seconds)


def solver(repeat: int) -> None:
    """Times the searches by themselves, each on a memory model that has answered nothing yet."""
    spec = resolve(LARGEST)
    for label, (machine, format_name) in SOLVER_MACHINES.items():
        hardware = describe(machine)
        for what, search in (
            ("can_place", can_place),
            ("place_fastest", place_fastest),
            ("least_shortfall", least_shortfall),
            ("place_streaming", place_streaming),
        ):
            seconds = []
            for _ in range(repeat):
                planner = Planner(spec, hardware, PlanRequest(format=format_name), Notes())
                slots = planner.candidate(format_name, 8192, 1).slots
                fits = can_place(slots)
                if what == "least_shortfall" and fits:
                    break
                seconds.append(_timed(lambda: search(slots)))  # noqa: B023 - called at once
            if seconds:
                _print(what=what, model=LARGEST, machine=label, seconds=seconds)


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _print(*, seconds: list[float], **labels: str) -> None:
    line = {
        "benchmark": "planning",
        **labels,
        "median_s": round(median(seconds), 4),
        "max_s": round(max(seconds), 4),
        "repeat": len(seconds),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    """Times both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--solver-only", action="store_true")
    arguments = parser.parse_args()
    solver(arguments.repeat)
    if not arguments.solver_only:
        commands(arguments.repeat)


if __name__ == "__main__":
    main()
