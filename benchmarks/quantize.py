"""`oomproof quantize`: how fast, and how much memory of the host and of a GPU.

    python tools/make_checkpoint.py --like llama-3.1-8b SOURCE
    python benchmarks/quantize.py SOURCE OUT [--format nf4-dq] [--device auto] > results.jsonl

OUT is a folder on the disk that is measured; each run writes it anew. Two JSON lines for searched
scales, two for bitsandbytes' own:

"process"   the command as a user starts it, in a process of its own. Its peak is the kernel's own
            (VmHWM: all that was resident at once, anonymous, mapped from files and shared, so with
            libraries and, on a GPU, CUDA's context; the page cache is no process's and not in it).
            Anonymous and mapped memory apart are looked at every few milliseconds. On a GPU
            device_used_bytes is what the driver gave away meanwhile, context included.
"added"     the same in this process after the bundled model was quantized: what a job adds to
            libraries, context and kernels, compared with its stated bound (QuantizeJob.host_bytes),
            and what torch's allocator reserved on the GPU. The files are verified afterwards.

Linux only. With several SOURCEs of one width the peaks tell whether they depend on the size.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from oomproof.conversion.quantize import prepare, run
from oomproof.models.resolve import resolve
from oomproof.session import quantize, verify
from oomproof.units import GIB

HOST_LIMIT_BYTES = 2 * GIB
"""What a 16 GB model may take in a process of its own, libraries included."""
_COMMAND = "from oomproof.cli.main import main; main()"
_FIELDS = ("VmHWM", "RssAnon", "RssFile", "RssShmem")
_LOOK_S = 0.004


def memory_of(process: int | str) -> dict[str, int]:
    """Bytes by the kernel's own names; empty for a process that is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return {}
    found = (re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE) for name in _FIELDS)
    return {name: int(one[1]) << 10 for name, one in zip(_FIELDS, found, strict=True) if one}


class Most:
    """The most that each of some numbers was."""

    def __init__(self, look: Callable[[], dict[str, int]]) -> None:
        self._look, self._stop = look, threading.Event()
        self.first = look()
        self.values = dict(self.first)

    def watch(self) -> None:
        """Until it is stopped."""
        while not self._stop.wait(_LOOK_S):
            for name, value in self._look().items():
                self.values[name] = max(value, self.values.get(name, 0))

    def stop(self) -> None:
        """Ends `watch`."""
        self._stop.set()


@contextmanager
def watched(look: Callable[[], dict[str, int]]) -> Iterator[Most]:
    """Measures while the block runs."""
    most = Most(look)
    thread = threading.Thread(target=most.watch)
    thread.start()
    try:
        yield most
    finally:
        most.stop()
        thread.join()


def device_used() -> dict[str, int]:
    """What the driver has given away of the GPUs of this process."""
    if not torch.cuda.is_available():
        return {}
    numbers = range(torch.cuda.device_count())
    free = [torch.cuda.mem_get_info(number) for number in numbers]
    return {f"gpu{number}": whole - left for number, (left, whole) in enumerate(free)}


def in_a_process(source: str, out: Path, arguments: Sequence[str]) -> dict[str, object]:
    """The command, from its start to its end."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", _COMMAND, "quantize", source, "--out", str(out), "--json"]
    begin_s = time.perf_counter()
    with (
        watched(device_used) as devices,
        subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as process,
        watched(lambda: memory_of(process.pid)) as host,
    ):
        answer, _ = process.communicate()
    seconds = time.perf_counter() - begin_s
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}")
    report = json.loads(answer)
    grown = {name: value - devices.first[name] for name, value in devices.values.items()}
    return {
        "kind": "process",
        **{name: report[name] for name in ("format", "block_scales", "device")},
        **{name: report[name] for name in ("source_bytes", "output_bytes")},
        "seconds": seconds,
        "quantizing_s": report["seconds"],
        "host_peak_bytes": host.values["VmHWM"],
        "host_anonymous_bytes": host.values["RssAnon"],
        "host_mapped_bytes": host.values["RssFile"],
        "host_shared_bytes": host.values["RssShmem"],
        "host_limit_bytes": HOST_LIMIT_BYTES,
        "within_limit": host.values["VmHWM"] <= HOST_LIMIT_BYTES,
        "device_used_bytes": max(grown.values(), default=0),
    }


def added(
    source: str, out: Path, format_name: str, device: str, *, search: bool
) -> dict[str, object]:
    """What a job adds to a process that has quantized before."""
    shutil.rmtree(out, ignore_errors=True)
    job = prepare(resolve(source), out, format_name=format_name, device=device, search=search)
    on_gpu = job.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.device)

    def resident() -> dict[str, int]:
        now = memory_of("self")
        return {"resident": now["RssAnon"] + now["RssFile"] + now["RssShmem"]}

    with watched(resident) as host:
        report = run(job)
    grown = host.values["resident"] - host.first["resident"]
    return {
        "kind": "added",
        "format": format_name,
        "block_scales": report.block_scales,
        "device": torch.cuda.get_device_name(job.device) if on_gpu else "cpu",
        "source_bytes": report.source_bytes,
        "output_bytes": report.output_bytes,
        "seconds": report.seconds,
        "source_bytes_per_s": report.source_bytes / report.seconds,
        "host_before_bytes": host.first["resident"],
        "host_grown_bytes": grown,
        "host_bound_bytes": job.host_bytes,
        "within_bound": grown <= job.host_bytes,
        "device_peak_bytes": torch.cuda.max_memory_reserved(job.device) if on_gpu else 0,
        "verified_files": verify(out),
    }


def warm_up(format_name: str, device: str) -> None:
    """Loads libraries and kernels."""
    with tempfile.TemporaryDirectory() as folder:
        for search in (True, False):
            place = Path(folder) / str(search)
            quantize("tiny", place, format=format_name, device=device, search=search)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--format", default="nf4-dq")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=("process", "added"))
    parser.add_argument("--scales", choices=("searched", "absmax"), help="default: both")
    given = parser.parse_args()
    choices = [given.scales] if given.scales else ["searched", "absmax"]
    options = ["--format", given.format, "--device", given.device]
    warm = given.only == "process"
    for search in [choice == "searched" for choice in choices] * given.repeats:
        if given.only != "added":
            flag = "--search" if search else "--no-search"
            print(json.dumps(in_a_process(given.source, given.out, [*options, flag])), flush=True)
        if given.only != "process":
            if not warm:
                warm_up(given.format, given.device)
                warm = True
            result = added(given.source, given.out, given.format, given.device, search=search)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
