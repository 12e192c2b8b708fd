"""`oomproof quantize`: how fast, and how much memory of the host and of a GPU.

    python tools/make_checkpoint.py --like llama-3.1-8b SOURCE
    python benchmarks/quantize.py SOURCE OUT [--format nf4-dq] [--device auto] > results.jsonl

OUT is a folder on the disk that is measured; each repeat writes it anew. What the process holds
before (libraries, a CUDA context, kernels: the bundled model is quantized first) is told apart from
what quantizing adds, which is compared with its stated bound. One JSON line a repeat.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from oomproof.conversion.quantize import prepare, run
from oomproof.models.resolve import resolve
from oomproof.session import quantize, verify


class Peak:
    """The most memory that this process had resident, looked at every few milliseconds."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.before_bytes = self.peak_bytes = self._process.memory_info().rss
        self._stop = threading.Event()

    def watch(self) -> None:
        """Until it is stopped."""
        while not self._stop.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def stop(self) -> None:
        """Ends `watch`."""
        self._stop.set()


@contextmanager
def watched() -> Iterator[Peak]:
    """Measures what the block takes."""
    peak = Peak()
    thread = threading.Thread(target=peak.watch)
    thread.start()
    try:
        yield peak
    finally:
        peak.stop()
        thread.join()


def measure(source: str, out: Path, format_name: str, device: str) -> dict[str, object]:
    """One run."""
    shutil.rmtree(out, ignore_errors=True)
    job = prepare(resolve(source), out, format_name=format_name, device=device)
    on_gpu = job.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.device)
    with watched() as peak:
        report = run(job)
    files = verify(out)
    grown = peak.peak_bytes - peak.before_bytes
    return {
        "format": format_name,
        "device": torch.cuda.get_device_name(job.device) if on_gpu else "cpu",
        "source_bytes": report.source_bytes,
        "output_bytes": report.output_bytes,
        "seconds": report.seconds,
        "source_bytes_per_s": report.source_bytes / report.seconds,
        "host_before_bytes": peak.before_bytes,
        "host_grown_bytes": grown,
        "host_bound_bytes": job.host_bytes,
        "host_peak_bytes": peak.peak_bytes,
        "within_bound": grown <= job.host_bytes,
        "device_peak_bytes": torch.cuda.max_memory_reserved(job.device) if on_gpu else 0,
        "verified_files": files,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--format", default="nf4-dq")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quantize("tiny", Path(folder) / "warm", format=arguments.format, device=arguments.device)
    for _ in range(arguments.repeats):
        result = measure(arguments.source, arguments.out, arguments.format, arguments.device)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
