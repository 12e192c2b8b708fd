"""Predicted against measured memory over shapes, formats, caps and contexts, by rehearsal.

    python benchmarks/rehearsals.py [--rows ROW …] > results.jsonl
    python benchmarks/rehearsals.py --check

Each row is one `oomproof rehearse` in a process of its own: random weights at true shapes, planned
under a cap, loaded, filled to the planned context and timed: `native-…` rows through our own
engine, others through transformers and bitsandbytes. `--rows native` is all of ours on one GPU.
One JSON line a row goes to stdout: every term beside its measurement, speeds, device, versions.
`--check` only plans the rows, for an H200 that need not be here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from oomproof.hardware.probe import probe


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    model: str
    format: str
    context: int
    cap: str | None = None
    concurrency: int = 1
    max_memory: tuple[str, ...] = ()
    engine: str = "transformers"
    kv_format: str = "auto"
    offload: str = "none"

    @property
    def options(self) -> list[str]:
        """As the command line takes them."""
        found = ["--format", self.format, "--context", str(self.context)]
        found += ["--concurrency", str(self.concurrency), "--engine", self.engine]
        found += ["--kv-format", self.kv_format, "--offload", self.offload]
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


def _native(model: str, *rows: tuple[str, str, int, int]) -> dict[str, Row]:
    """Rows of (format, cap, context, requests at once) by name."""
    size = next(part for part in reversed(model.split("-")) if part.endswith("b"))
    return {
        f"native-{size}-{name}-{context // 1024}k-{requests}": Row(
            model=model,
            format=name,
            cap=cap,
            context=context,
            concurrency=requests,
            engine="native",
        )
        for name, cap, context, requests in rows
    }


NATIVE = {
    **_native(
        "llama-3.2-1b",
        ("bf16", "8GiB", 32768, 1),
        ("int8", "8GiB", 8192, 4),
        ("fp8", "8GiB", 2048, 4),
        ("nf4", "8GiB", 32768, 4),
        ("nf4-dq", "8GiB", 8192, 1),
    ),
    **_native(
        "llama-3.2-3b",
        ("bf16", "8GiB", 2048, 1),
        ("int8", "8GiB", 8192, 4),
        ("fp8", "12GiB", 32768, 1),
        ("nf4", "8GiB", 8192, 1),
        ("nf4-dq", "8GiB", 32768, 1),
    ),
    **_native(
        "llama-3.1-8b",
        ("bf16", "24GiB", 8192, 4),
        ("int8", "12GiB", 8192, 1),
        ("fp8", "16GiB", 32768, 1),
        ("nf4", "12GiB", 32768, 1),
        ("nf4-dq", "8GiB", 8192, 1),
        ("nf4-dq", "16GiB", 8192, 4),
    ),
    **_native(
        "qwen2.5-14b",
        ("bf16", "48GiB", 8192, 4),
        ("int8", "24GiB", 8192, 4),
        ("fp8", "24GiB", 32768, 1),
        ("nf4", "16GiB", 8192, 1),
        ("nf4-dq", "12GiB", 2048, 1),
    ),
    **_native(
        "qwen3-32b",
        ("bf16", "80GiB", 8192, 1),
        ("int8", "48GiB", 8192, 4),
        ("fp8", "48GiB", 32768, 1),
        ("nf4", "24GiB", 2048, 1),
        ("nf4-dq", "24GiB", 8192, 1),
    ),
    **_native(
        "llama-3.1-70b",
        ("int8", "80GiB", 8192, 1),
        ("fp8", "80GiB", 2048, 4),
        ("nf4", "48GiB", 8192, 1),
        ("nf4-dq", "80GiB", 32768, 1),
        ("nf4-dq", "48GiB", 2048, 4),
    ),
}
"""Our own engine on one GPU."""
FURTHER = {
    # Half of the layers in host memory.
    "native-offload": Row(
        model="llama-3.1-8b",
        format="bf16",
        cap="11GiB",
        context=8192,
        engine="native",
        offload="cpu",
    ),
    "native-fp8-kv": Row(
        model="llama-3.1-8b",
        format="nf4-dq",
        cap="16GiB",
        context=32768,
        concurrency=4,
        engine="native",
        kv_format="fp8",
    ),
    "native-two-8b": Row(
        model="llama-3.1-8b",
        format="nf4-dq",
        context=8192,
        max_memory=("0=4GiB", "1=6GiB"),
        engine="native",
    ),
    "native-two-8b-bf16": Row(
        model="llama-3.1-8b",
        format="bf16",
        context=8192,
        concurrency=4,
        max_memory=("0=14GiB", "1=9GiB"),
        engine="native",
    ),
    "native-two-70b": Row(
        model="llama-3.1-70b",
        format="nf4-dq",
        context=8192,
        max_memory=("0=16GiB", "1=32GiB"),
        engine="native",
    ),
}
ROWS |= NATIVE | FURTHER


def rehearse(name: str) -> dict[str, object]:
    """One row, in a process of its own."""
    # Imported here, so that no row waits for it.
    from oomproof.cli.main import main as command_line

    def run() -> None:
        sys.argv = ["oomproof", "rehearse", row.model, *row.options, "--no-note", "--json"]
        command_line()

    row = ROWS[name]
    started = time.perf_counter()
    exit_code, output = in_a_child(run)
    found = json.loads(output) if output else {}
    return {
        "benchmark": "rehearsals",
        "row": name,
        "exit_code": exit_code,
        "wall_s": round(time.perf_counter() - started, 1),
        "cap": row.cap,
        "max_memory": row.max_memory,
        **machine(),
        **found,
    }


def in_a_child(run: Callable[[], None]) -> tuple[int, str]:
    """(exit code, stdout) of a call in a fork of this process.

    A fork has torch imported already, which takes seconds, and its own CUDA context: this process
    never makes one.
    """
    import torch  # noqa: F401

    sys.stdout.flush()
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), sys.stdout.fileno())
            code = 1
            try:
                run()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:  # noqa: BLE001 - shown, and told by the exit code
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def machine() -> dict[str, object]:
    """Where and with what something was measured; no CUDA context is made for it."""
    import torch

    import oomproof

    # Names come from NVML: asking torch would make a CUDA context in the parent of every row.
    devices = probe().devices
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": devices[0].name,
        "devices_here": len(devices),
        "versions": {
            "oomproof": oomproof.__version__,
            "torch": torch.__version__,
            **{name: _version(name) for name in ("triton", "transformers", "bitsandbytes")},
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check() -> None:
    """Plans every row on H200s, and prints what fits."""
    import oomproof

    for name, row in ROWS.items():
        gpus = "2xH200" if "two" in name else "4xH200" if "four" in name else "H200"
        limits = dict(limit.split("=") for limit in row.max_memory)
        plan = oomproof.plan(
            row.model,
            gpus=gpus,
            format=row.format,
            context=row.context,
            concurrency=row.concurrency,
            cap=row.cap,
            engine=row.engine,
            kv_format=row.kv_format,
            offload=row.offload,
            max_memory={int(index): size for index, size in limits.items()},
        )
        peaks = [round(device.peak_bytes / 2**30, 2) for device in plan.devices_in_use]
        print(f"{name:14} fits {plan.fits} peaks {peaks} GiB, context up to {plan.max_context:,}")


def main() -> None:
    """Runs the rows that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="*", default=ONE_GPU, choices=[*ROWS, "native"])
    parser.add_argument("--check", action="store_true", help="plan the rows, run nothing")
    arguments = parser.parse_args()
    if arguments.check:
        check()
        return
    for name in NATIVE if arguments.rows == ["native"] else arguments.rows:
        print(json.dumps(rehearse(name)), flush=True)


if __name__ == "__main__":
    main()
