"""From `load()` until a request is accepted, in a process that has a CUDA context.

    python benchmarks/loading.py FOLDER [--format nf4-dq] [--repeats 3] [--against] > results.jsonl

FOLDER holds a checkpoint (tools/make_checkpoint.py makes one at a model's true shapes). Each repeat
is a process of its own: it imports what loading needs, makes a CUDA context, and times `load`,
graph capture included, up to a request that is accepted. The files are in the page cache: the first
repeat, which brings them there and fills the cache of compiled kernels, is told apart. `--against`
times transformers' own `from_pretrained` with bitsandbytes the same way, in turn.
One JSON line a repeat goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def load_ours(folder: Path, format_name: str, context: int) -> dict[str, object]:
    """One load by oomproof in this process."""
    began = time.perf_counter()
    import torch
    import transformers

    import oomproof
    from oomproof.compat import tokenizer as _tokenizer  # noqa: F401 - imports are not loading
    from oomproof.engine.native import kernels_triton as _kernels  # noqa: F401
    from oomproof.engine.native import load as _native_load  # noqa: F401
    from oomproof.quantization import products_cuda as _products  # noqa: F401

    import_s = time.perf_counter() - began
    plan = oomproof.plan(folder, format=format_name, context=context)
    _make_context()
    before = _peak_rss()
    started = time.perf_counter()
    model = oomproof.load(plan)
    loaded_s = time.perf_counter() - started
    stream = model.stream("the", raw=True, max_new_tokens=1, temperature=0)
    accepted_s = time.perf_counter() - started
    "".join(stream)
    first_token_s = time.perf_counter() - started
    model.close()
    started = time.perf_counter()
    oomproof.load(plan).close()
    again_s = time.perf_counter() - started
    return {
        "engine": plan.engine,
        "import_s": import_s,
        "load_s": loaded_s,
        "accepted_s": accepted_s,
        "first_token_s": first_token_s,
        "load_and_close_again_s": again_s,
        "host_before_bytes": before,
        "host_peak_bytes": _peak_rss(),
        "device_bytes": torch.cuda.max_memory_reserved(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def load_theirs(folder: Path, format_name: str) -> dict[str, object]:
    """One load by transformers and bitsandbytes in this process."""
    import bitsandbytes
    import torch
    import transformers

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format_name[:3],
        bnb_4bit_use_double_quant=format_name.endswith("-dq"),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    _make_context()
    before = _peak_rss()
    started = time.perf_counter()
    transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=settings, device_map={"": 0}
    )
    torch.cuda.synchronize()
    loaded_s = time.perf_counter() - started
    return {
        "engine": "transformers",
        "load_s": loaded_s,
        "host_before_bytes": before,
        "host_peak_bytes": _peak_rss(),
        "device_bytes": torch.cuda.max_memory_reserved(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bitsandbytes": bitsandbytes.__version__,
        },
    }


def _make_context() -> None:
    import torch

    torch.cuda.init()
    torch.ones(1, device="cuda")
    torch.cuda.synchronize()


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Runs the repeats, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", default="nf4-dq")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", action="store_true")
    parser.add_argument("--one", choices=("ours", "theirs"), help="one load in this process")
    arguments = parser.parse_args()
    if arguments.one == "ours":
        print(json.dumps(load_ours(arguments.folder, arguments.format, arguments.context)))
        return
    if arguments.one == "theirs":
        print(json.dumps(load_theirs(arguments.folder, arguments.format)))
        return
    for repeat in range(1 + arguments.repeats):
        for who in ("ours", "theirs") if arguments.against else ("ours",):
            command = [sys.executable, __file__, str(arguments.folder), "--one", who]
            command += ["--format", arguments.format, "--context", str(arguments.context)]
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout) if done.stdout else {"failed": done.returncode}
            print(
                json.dumps(
                    {
                        "benchmark": "loading",
                        "folder": arguments.folder.name,
                        "format": arguments.format,
                        "first": repeat == 0,
                        "device": _device_name(),
                        "date": time.strftime("%Y-%m-%d"),
                        **found,
                    }
                ),
                flush=True,
            )


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
