"""Predicted against measured memory of transformers, term by term, on one GPU under a cap.

    python benchmarks/contract.py --work DIR [--cases CASE …] > results.jsonl

Each case runs in a process of its own: a random checkpoint at true shapes is planned under a cap,
loaded as planned, given a prompt that fills the context but for the answer, and answered. One JSON
line a case goes to stdout: every term of the plan beside its measurement, speeds, device, versions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

NEW_TOKENS = 96
WARM_UP_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    like: str
    format: str
    cap: str
    context: int
    concurrency: int = 1
    layers: int | None = None
    max_memory: tuple[tuple[int, str], ...] = ()
    """(device, size) pairs, for runs over several GPUs."""

    @property
    def checkpoint(self) -> str:
        """Name of the folder that holds its weights."""
        return self.like if self.layers is None else f"{self.like}-{self.layers}-layers"


CASES = {
    "8b-8gib": Case(like="llama-3.1-8b", format="nf4-dq", cap="8GiB", context=2048),
    "8b-8gib-8k": Case(like="llama-3.1-8b", format="nf4-dq", cap="8GiB", context=8192),
    "8b-12gib-nf4-32k": Case(like="llama-3.1-8b", format="nf4", cap="12GiB", context=32768),
    "8b-12gib-int8": Case(like="llama-3.1-8b", format="llm-int8", cap="12GiB", context=4096),
    "8b-24gib-bf16": Case(like="llama-3.1-8b", format="bf16", cap="24GiB", context=8192),
    "8b-16gib-4x4k": Case(
        like="llama-3.1-8b", format="nf4-dq", cap="16GiB", context=4096, concurrency=4
    ),
    "1b-6gib-bf16": Case(like="llama-3.2-1b", format="bf16", cap="6GiB", context=8192),
    "8b-two-gpus": Case(
        like="llama-3.1-8b",
        format="nf4-dq",
        cap="24GiB",
        context=4096,
        max_memory=((0, "4GiB"), (1, "6GiB")),
    ),
    "405b-2-layers": Case(
        like="llama-3.1-405b", format="nf4-dq", cap="40GiB", context=8192, layers=2
    ),
}

ONE_GPU = [name for name, case in CASES.items() if not case.max_memory]


def run_case(case: Case, folder: Path) -> dict[str, object]:
    """Plans, loads and answers one case in this process."""
    import bitsandbytes
    import torch
    import transformers

    import oomproof

    plan = oomproof.plan(
        folder,
        format=case.format,
        cap=case.cap,
        context=case.context,
        concurrency=case.concurrency,
        max_memory=dict(case.max_memory),
        engine="transformers",
    )
    began = time.perf_counter()
    model = oomproof.load(plan)
    torch.cuda.synchronize()
    load_s = time.perf_counter() - began
    model.generate("the " * 16, raw=True, max_new_tokens=WARM_UP_TOKENS, temperature=0)
    prompt = "the " * (2 * case.context)
    tokens = model.tokenizer.encode(prompt)[: case.context - NEW_TOKENS]
    text = model.tokenizer.decode(tokens)
    while len(model.tokenizer.encode(text)) > case.context - NEW_TOKENS:
        text = text[: -len("the " * 4)]
    streams = [
        model.stream(text, raw=True, max_new_tokens=NEW_TOKENS, temperature=0.8, seed=i)
        for i in range(case.concurrency)
    ]
    for stream in streams:
        for _ in stream:
            pass
    measured = model.measured_terms()
    return {
        "benchmark": "contract",
        "device": torch.cuda.get_device_name(),
        "versions": {
            "oomproof": oomproof.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bitsandbytes": bitsandbytes.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "model": case.checkpoint,
        "format": case.format,
        "cap": case.cap,
        "context": case.context,
        "concurrency": case.concurrency,
        "fits": plan.fits,
        "never_above": all(
            measured[d.index].peak_bytes <= d.peak_bytes - d.terms.margin
            for d in plan.devices_in_use
        ),
        "devices": [
            {
                "index": device.index,
                "layers": device.layers,
                "predicted": device.terms.as_dict(),
                "measured": measured[device.index].as_dict(),
                "predicted_peak_bytes": device.peak_bytes - device.terms.margin,
                "measured_peak_bytes": measured[device.index].peak_bytes,
                "max_memory_allocated": torch.cuda.max_memory_allocated(device.index),
            }
            for device in plan.devices_in_use
        ],
        "load_s": round(load_s, 3),
        "prompt_tokens": streams[0].prompt_tokens,
        "first_token_s": round(streams[0].first_token_s or 0, 4),
        "tokens_per_second": round(streams[0].tokens_per_second or 0, 2),
        "predicted_tokens_per_second": plan.tokens_per_second.decode,
        "predicted_prefill": plan.tokens_per_second.prefill,
        "host_peak_rss_bytes": _peak_rss(),
        "predicted_host_bytes": plan.host.peak_bytes,
    }


def _peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Runs every case in a process of its own, or one case in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--cases", nargs="*", default=ONE_GPU, choices=list(CASES))
    parser.add_argument("--one", action="store_true", help="run the one case in this process")
    arguments = parser.parse_args()
    if arguments.one:
        case = CASES[arguments.cases[0]]
        print(json.dumps(run_case(case, arguments.work / case.checkpoint)), flush=True)
        return
    for name in arguments.cases:
        _make_checkpoint(CASES[name], arguments.work)
        command = [sys.executable, __file__, "--work", str(arguments.work), "--one"]
        done = subprocess.run([*command, "--cases", name], check=False)
        if done.returncode:
            print(json.dumps({"benchmark": "contract", "case": name, "failed": done.returncode}))


def _make_checkpoint(case: Case, work: Path) -> None:
    folder = work / case.checkpoint
    if (folder / "model.safetensors.index.json").exists():
        return
    tool = Path(__file__).parents[1] / "tools" / "make_checkpoint.py"
    layers = [] if case.layers is None else ["--layers", str(case.layers)]
    command = [sys.executable, str(tool), "--like", case.like, *layers, str(folder)]
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
