"""Predicted against measured memory over shapes, formats, caps and contexts, by rehearsal.

    python benchmarks/rehearsals.py [--rows ROW …] > results.jsonl
    python benchmarks/rehearsals.py --check

Each row is one `oomproof rehearse` in a process of its own: random weights at true shapes, planned
under a cap, loaded through transformers and bitsandbytes, filled to the planned context and timed.
One JSON line a row goes to stdout: every term beside its measurement, speeds, device, versions.
`--check` only plans the rows, for an H200 that need not be here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    model: str
    format: str
    context: int
    cap: str | None = None
    concurrency: int = 1
    max_memory: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """As the command line takes them."""
        found = ["--format", self.format, "--context", str(self.context)]
        found += ["--concurrency", str(self.concurrency)]
        found += ["--cap", self.cap] if self.cap else []
        for limit in self.max_memory:
            found += ["--max-memory", limit]
        return found


ROWS = {
    "1b-bf16": Row(model="llama-3.2-1b", format="bf16", cap="6GiB", context=8192),
    "1b-int8": Row(model="llama-3.2-1b", format="llm-int8", cap="5GiB", context=4096),
    "1b-nf4": Row(model="llama-3.2-1b", format="nf4", cap="4GiB", context=2048),
    "1b-nf4-dq": Row(model="llama-3.2-1b", format="nf4-dq", cap="8GiB", context=65536),
    "3b-bf16": Row(model="llama-3.2-3b", format="bf16", cap="10GiB", context=8192),
    "3b-int8": Row(model="llama-3.2-3b", format="llm-int8", cap="8GiB", context=4096),
    "3b-nf4": Row(model="llama-3.2-3b", format="nf4", cap="6GiB", context=4096),
    "3b-nf4-dq": Row(model="llama-3.2-3b", format="nf4-dq", cap="8GiB", context=16384),
    "8b-bf16": Row(model="llama-3.1-8b", format="bf16", cap="24GiB", context=8192),
    "8b-int8": Row(model="llama-3.1-8b", format="llm-int8", cap="12GiB", context=4096),
    "8b-nf4": Row(model="llama-3.1-8b", format="nf4", cap="12GiB", context=32768),
    "8b-nf4-dq": Row(model="llama-3.1-8b", format="nf4-dq", cap="8GiB", context=2048),
    "8b-nf4-dq-4": Row(
        model="llama-3.1-8b", format="nf4-dq", cap="16GiB", context=4096, concurrency=4
    ),
    "14b-bf16": Row(model="qwen2.5-14b", format="bf16", cap="40GiB", context=8192),
    "14b-int8": Row(model="qwen2.5-14b", format="llm-int8", cap="24GiB", context=4096),
    "14b-nf4": Row(model="qwen2.5-14b", format="nf4", cap="24GiB", context=32768),
    "14b-nf4-dq": Row(model="qwen2.5-14b", format="nf4-dq", cap="14GiB", context=8192),
    "two-8b": Row(
        model="llama-3.1-8b",
        format="nf4-dq",
        context=4096,
        max_memory=("0=4GiB", "1=6GiB"),
    ),
    "two-8b-bf16": Row(
        model="llama-3.1-8b",
        format="bf16",
        context=8192,
        max_memory=("0=16GiB", "1=8GiB"),
    ),
    "two-70b": Row(
        model="llama-3.1-70b",
        format="nf4-dq",
        context=8192,
        max_memory=("0=24GiB", "1=32GiB"),
    ),
    "four-405b": Row(model="llama-3.1-405b", format="nf4-dq", cap="80GiB", context=8192),
    "four-405b-64": Row(model="llama-3.1-405b", format="nf4-dq", cap="64GiB", context=4096),
}
ONE_GPU = [name for name in ROWS if not name.startswith(("two", "four"))]


def rehearse(name: str) -> dict[str, object]:
    """One row, in a process of its own."""
    row = ROWS[name]
    command = [sys.executable, "-c", "from oomproof.cli.main import main; main()"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "rehearse", row.model, *row.options, "--no-note", "--json"],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(done.stdout) if done.stdout else {}
    return {
        "benchmark": "rehearsals",
        "row": name,
        "exit_code": done.returncode,
        "wall_s": round(time.perf_counter() - started, 1),
        "cap": row.cap,
        "max_memory": row.max_memory,
        **_machine(),
        **found,
    }


def _machine() -> dict[str, object]:
    import bitsandbytes
    import torch
    import transformers

    import oomproof

    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "devices_here": torch.cuda.device_count(),
        "versions": {
            "oomproof": oomproof.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bitsandbytes": bitsandbytes.__version__,
        },
    }


def check() -> None:
    """Plans every row on H200s, and prints what fits."""
    import oomproof

    for name, row in ROWS.items():
        gpus = {"two": "2xH200", "fou": "4xH200"}.get(name[:3], "H200")
        limits = dict(limit.split("=") for limit in row.max_memory)
        plan = oomproof.plan(
            row.model,
            gpus=gpus,
            format=row.format,
            context=row.context,
            concurrency=row.concurrency,
            cap=row.cap,
            max_memory={int(index): size for index, size in limits.items()},
        )
        peaks = [round(device.peak_bytes / 2**30, 2) for device in plan.devices_in_use]
        print(f"{name:14} fits {plan.fits} peaks {peaks} GiB, context up to {plan.max_context:,}")


def main() -> None:
    """Runs the rows that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="*", default=ONE_GPU, choices=list(ROWS))
    parser.add_argument("--check", action="store_true", help="plan the rows, run nothing")
    arguments = parser.parse_args()
    if arguments.check:
        check()
        return
    for name in arguments.rows:
        print(json.dumps(rehearse(name)), flush=True)


if __name__ == "__main__":
    main()
