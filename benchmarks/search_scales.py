"""What searching block scales costs: the linears of an 8B quantized on a GPU, plain and searched.

    python -m benchmarks.search_scales [--formats nf4,nf4-dq,fp4,int4] [--repeats 5] [--layers 32]

One JSON line a format and way: seconds for all layers, weights a second, and the relative squared
error. Weights are made once, of every shape of a layer, and quantized slice by slice as the loader
does, in slices of 32 MiB, without the copies that overlap with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator

import torch

from oomproof.errors import InputError
from oomproof.formats import SEARCHED_FORMATS, get_format
from oomproof.quantization.handlers import handler

SHAPES = (
    (4096, 4096),
    (1024, 4096),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (14336, 4096),
    (4096, 14336),
)
"""[rows, columns] of a layer of Llama 3.1 8B: q, k, v, o, gate, up, down."""
SLICE_BYTES = 32 << 20


def quantize_all(
    name: str,
    weights: list[torch.Tensor],
    parts: list[dict[str, torch.Tensor]],
    *,
    search: bool,
    workspace: torch.Tensor,
) -> None:
    """Every weight of a layer, as the loader brings them."""
    held = handler(name, search=search)
    for weight, into in zip(weights, parts, strict=True):
        rows, columns = weight.shape
        step = max(1, SLICE_BYTES // (columns * weight.itemsize))
        for first in range(0, rows, step):
            part = weight[first : first + step]
            held.encode_slice(part, into, first, (rows, columns), workspace)
        held.finish(into, (rows, columns), workspace)


def rows_of(formats: list[str], repeats: int, layers: int) -> Iterator[dict[str, object]]:
    """The figures, one after the other."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    weights = [
        (0.02 * torch.randn(shape, generator=generator, device=device)).bfloat16()
        for shape in SHAPES
    ]
    count = layers * sum(weight.numel() for weight in weights)
    for name in formats:
        kind = get_format(name)
        parts = [
            {
                part.name: torch.empty(
                    part.numel, dtype=getattr(torch, part.dtype.value), device=device
                )
                for part in kind.components(*shape)
            }
            for shape in SHAPES
        ]
        numel = max(handler(name).workspace_numel(shape) for shape in SHAPES)
        workspace = torch.empty(numel, device=device)
        for search in (False, True):
            times = []
            for _ in range(repeats + 1):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(layers):
                    quantize_all(name, weights, parts, search=search, workspace=workspace)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            seconds = statistics.median(times[1:])
            decoded = handler(name).decode(parts[0], SHAPES[0], torch.float32)
            exact = weights[0].float()
            error = float((decoded - exact).square().sum() / exact.square().sum())
            yield {
                "benchmark": "search_scales",
                "device": torch.cuda.get_device_name(device),
                "torch": torch.__version__,
                "format": name,
                "search": search,
                "weights": count,
                "seconds": round(seconds, 5),
                "weights_per_s": round(count / seconds),
                "relative_squared_error": round(error, 7),
            }


def main() -> int:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", default=",".join(SEARCHED_FORMATS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    asked = parser.parse_args()
    formats = asked.formats.split(",")
    for name in formats:
        if name not in SEARCHED_FORMATS:
            raise InputError(
                f"{name!r} has no block scales to search",
                remedy=f"use some of {', '.join(SEARCHED_FORMATS)}",
            )
    if not torch.cuda.is_available():
        print("error: this needs a GPU", file=sys.stderr)
        return 1
    for row in rows_of(formats, asked.repeats, asked.layers):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
