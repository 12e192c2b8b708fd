"""Plans of training on transformers and peft beside what they take, at true shapes.

    python -m benchmarks.tuning_peft [--rows NAME ...] [--budget SECONDS] > results.jsonl

Each row plans a fine-tuning with random weights and runs three of its steps (`rehearse --tune`).
Printed are the planned peak over the measured one (what torch's tensors took, and the driver's
context), the share of the plan that torch's allocator held, and tokens a second. Rows that do not
fit or fail are reported, and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from typing import Any

import torch

from benchmarks.rehearsals import machine
from oomproof import rehearse_tuning
from oomproof.errors import OomproofError
from oomproof.units import GIB

LAYERS = {"checkpointing": "layers"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "8b b1": ("llama-3.1-8b", LAYERS),
    "8b b4": ("llama-3.1-8b", {**LAYERS, "micro_batch": 4}),
    "8b b1, all kept": ("llama-3.1-8b", {"checkpointing": "none"}),
    "8b 8k": ("llama-3.1-8b", {**LAYERS, "context": 8192}),
    "8b 8k, inputs on the host": ("llama-3.1-8b", {"checkpointing": "offload", "context": 8192}),
    "8b b1, dropout": ("llama-3.1-8b", {**LAYERS, "dropout": 0.1}),
    "8b b1, dropout, all kept": ("llama-3.1-8b", {"checkpointing": "none", "dropout": 0.1}),
    "8b b1, queries and values": (
        "llama-3.1-8b",
        {**LAYERS, "rank": 64, "target_modules": ("q_proj", "v_proj")},
    ),
    "qwen3 8b b2": ("qwen3-8b", {**LAYERS, "micro_batch": 2}),
    "gemma 2 9b b1": ("gemma-2-9b", LAYERS),
    "gemma 2 2b 4k": ("gemma-2-2b", {**LAYERS, "context": 4096}),
    "gemma 3 4b b2": ("gemma-3-4b", {**LAYERS, "micro_batch": 2}),
    "granite 8b b1": ("granite-3.3-8b", LAYERS),
    "phi 4 b1": ("phi-4", LAYERS),
    "olmo 2 7b b2": ("olmo-2-7b", {**LAYERS, "micro_batch": 2}),
    "qwen3 30b a3b b1": ("qwen3-30b-a3b", LAYERS),
    # The last: the driver keeps what its managed memory took.
    "8b b1, 8-bit states": ("llama-3.1-8b", {**LAYERS, "optimizer": "paged-adamw-8bit"}),
}
"""Name → model, options of `rehearse_tuning`."""


def context_bytes() -> int:
    """What the driver holds of an otherwise empty GPU; rows behind the first do not make it."""
    left, total = torch.cuda.mem_get_info()
    return int(total - left - torch.cuda.memory_reserved())


def run(name: str) -> dict[str, Any]:
    """One row's figures."""
    model, options = ROWS[name]
    micro = options.get("micro_batch", 1)
    found = rehearse_tuning(
        model, **{"engine": "transformers", "context": 2048, "batch_size": micro, **options}
    )
    plan, context = found.plan, context_bytes()
    took, held = context + found.allocated_bytes, context + found.reserved_bytes
    return {
        "model": model,
        "format": plan.format,
        "options": {**options, "micro_batch": plan.micro_batch},
        "planned_over_measured": round(found.predicted_bytes / took, 4),
        "planned_gib": round(found.predicted_bytes / GIB, 3),
        "measured_gib": round(took / GIB, 3),
        "context_gib": round(context / GIB, 3),
        "held_of_plan": round(held / plan.peak_bytes, 4),
        "failed": found.failed,
        "tokens_per_second": found.tokens_per_second,
        "predicted_tokens_per_second": found.predicted_tokens_per_second,
        "terms": plan.terms.as_dict(),
    }


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    asked = parser.parse_args()
    begin = time.perf_counter()
    print(json.dumps({"benchmark": "tuning_peft", "row": "machine", **machine()}), flush=True)
    for name in asked.rows:
        if time.perf_counter() - begin > asked.budget:
            result: dict[str, Any] = {"skipped": "no time left"}
        else:
            try:
                result = run(name)
            except (OomproofError, RuntimeError) as error:
                result = {"error": f"{type(error).__name__}: {error}"[:300]}
            gc.collect()
            torch.cuda.empty_cache()
        seconds = round(time.perf_counter() - begin, 1)
        line = {"benchmark": "tuning_peft", "row": name, **result, "at_s": seconds}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
