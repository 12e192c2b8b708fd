"""Time and memory that `oomproof plan` takes to refuse hostile folders, a JSON line each.

    python benchmarks/bad_input.py > benchmarks/results/bad-input.jsonl

The bound is 2 s and 200 MB for the whole process, start included.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from oomproof.models.resolve import bundled_folder

CONFIGS: dict[str, dict[str, object]] = {
    "-1 layers": {"num_hidden_layers": -1},
    "10^9 layers": {"num_hidden_layers": 10**9},
    "heads that do not divide": {"num_attention_heads": 7, "head_dim": None},
    "10^15 parameters": {"hidden_size": 131_072, "intermediate_size": 10**9},
    "unknown architecture": {"architectures": ["NopeForCausalLM"]},
}
TEXTS = {
    "no JSON": b"{",
    "a million brackets": b"[" * 1_000_000,
    "4 MiB of lists": b"[" + b"[]," * 1_390_000 + b"[]]",
}


def measure(folder: Path) -> dict[str, object]:
    """Runs `oomproof plan` on a folder: exit code, seconds, peak resident bytes, message."""
    command = [sys.executable, "-c", "from oomproof.cli.main import main; main()"]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*command, "plan", str(folder)], stdout=subprocess.DEVNULL, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        errors.seek(0)
        message = errors.read().decode()
    return {
        "exit_code": process.returncode,
        "seconds": round(seconds, 3),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "lines": message.count("\n"),
        "traceback": "Traceback" in message,
    }


def main() -> None:
    """Prints a line for every hostile folder."""
    with tempfile.TemporaryDirectory() as work:
        good = Path(shutil.copytree(bundled_folder(), Path(work) / "good"))
        config = json.loads((good / "config.json").read_text())
        cases: dict[str, bytes] = {
            name: json.dumps(config | fields).encode() for name, fields in CONFIGS.items()
        } | TEXTS
        for name, data in cases.items():
            folder = Path(shutil.copytree(good, Path(work) / "bad", dirs_exist_ok=True))
            (folder / "config.json").write_bytes(data)
            _say(name, measure(folder))
        folder = Path(shutil.copytree(good, Path(work) / "bad", dirs_exist_ok=True))
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", 100_000_000))
            file.truncate(200_000_000)
        _say("a header of 100 MB", measure(folder))


def _say(name: str, measured: dict[str, object]) -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    line = {"benchmark": "bad input", "case": name, "device": machine, **measured}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
