"""Products of a few tokens with 4-bit weights, alone and cold, beside bitsandbytes' own.

    python -m benchmarks.products [--models llama-3.1-8b …] [--tokens 1 8 …] > results.jsonl

The four products of a layer at true shapes, in nf4-dq and bfloat16. bitsandbytes quantizes made-up
weights; the same codes, in tiles, are ours, and go the way that the engine's decode steps go
(quantization/products_tiled.py). Weights take turns with copies of them, together larger than the
second cache, in a CUDA graph; the two sides take turns too, and a figure is the median of the
repeats. bitsandbytes multiplies linear by linear, as transformers does, and, where a product has
several, also with one weight of all their rows; gate and up are ours with SwiGLU's gate, and its
without. Without bitsandbytes ours are timed alone. One JSON line a product and number of tokens
goes to stdout, a short one to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from benchmarks.rehearsals import machine
from oomproof.formats import BLOCK_SIZE, ceil_div
from oomproof.quantization.tables import codebook_of
from oomproof.quantization.tiled import Nested, Segment, TiledSet
from oomproof.quantization.tiles import (
    TILE_ROWS,
    tile_bytes,
    tile_codes,
    tile_scale_rows,
    tile_scales,
    tiles_of,
)
from oomproof.units import MIB

FORMAT = "nf4-dq"
COLD_BYTES = 400 * MIB
"""Of a product's weights in turn, at least: several times the second cache of any GPU today."""
SCRATCH_BYTES = 64 * MIB
"""For the sums of splits; an engine has as much."""
MOST_ERROR = 1e-2
"""Between two results in bfloat16: relative, of the norms."""
_LAUNCHES = 32
"""Of a graph, at least."""
_REPEATS = 7
_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A product of a layer."""

    name: str
    rows: tuple[int, ...]
    """Of each of its linears."""
    columns: int

    @property
    def in_turn(self) -> bool:
        """Whether tiles of its linears take turns, and SwiGLU's gate follows."""
        return self.name == "gate_up"

    @property
    def weight_bytes(self) -> int:
        """That one product reads of its weights, in nf4-dq."""
        blocks = [rows * self.columns // BLOCK_SIZE for rows in self.rows]
        return sum(BLOCK_SIZE // 2 * count + count + 4 * ceil_div(count, 256) for count in blocks)


def layer_shapes(
    hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int = 128
) -> tuple[Shape, ...]:
    """The products of a decoder layer."""
    wide, narrow = heads * head_dim, kv_heads * head_dim
    return (
        Shape(name="qkv", rows=(wide, narrow, narrow), columns=hidden),
        Shape(name="o", rows=(hidden,), columns=wide),
        Shape(name="gate_up", rows=(intermediate, intermediate), columns=hidden),
        Shape(name="down", rows=(hidden,), columns=intermediate),
    )


MODELS = {
    "llama-3.1-8b": layer_shapes(4096, 14336, 32, 8),
    "llama-3.1-70b": layer_shapes(8192, 28672, 64, 8),
}
TOKENS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """A weight in bitsandbytes' own order."""

    codes: torch.Tensor
    """uint8 [rows · columns / 2, 1]."""
    state: Any
    """bitsandbytes' QuantState; None where the codes are made up."""
    absmax: torch.Tensor
    """uint8 [rows · columns / 64]."""
    nested: Nested


def quantize(rows: int, columns: int, device: torch.device, *, made_up: bool) -> Quantized:
    """A random weight in nf4-dq, by bitsandbytes; `made_up`: random codes, without it."""
    if made_up:
        blocks = rows * columns // BLOCK_SIZE
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
        return Quantized(
            codes=torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8, device=device),
            state=None,
            absmax=absmax,
            nested=(
                torch.full((ceil_div(blocks, 256),), 0.02, device=device),
                torch.linspace(-1, 1, 256, device=device),
                torch.tensor(0.05, device=device),
            ),
        )
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=device) * _DEVIATION
    codes, state = quantize_4bit(
        weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
    )
    return Quantized(
        codes=codes,
        state=state,
        absmax=state.absmax,
        nested=(state.state2.absmax, state.state2.code, state.offset),
    )


def tiled(weights: Sequence[Quantized], shape: Shape, quant_map: torch.Tensor) -> TiledSet:
    """The same codes in tiles, as one stream, as the engine holds them."""
    columns = shape.columns
    counts = [rows // TILE_ROWS for rows in shape.rows]
    codes = quant_map.new_empty(sum(counts) * tile_bytes(columns), dtype=torch.uint8)
    scales = quant_map.new_empty(sum(counts) * tile_scales(columns), dtype=torch.uint8)
    segments = []
    for number, (rows, one) in enumerate(zip(shape.rows, weights, strict=True)):
        first, stride = (number, len(counts)) if shape.in_turn else (sum(counts[:number]), 1)
        place = {"count": counts[number], "first": first, "stride": stride}
        tile_codes(one.codes.view(rows, -1), tiles_of(codes, tile_bytes(columns), **place))
        absmax = one.absmax.view(rows, -1)
        tile_scale_rows(absmax, tiles_of(scales, tile_scales(columns), **place))
        segments.append(Segment(rows=rows, first_tile=first, tile_stride=stride, nested=one.nested))
    return TiledSet(
        codes=codes.view(-1, tile_bytes(columns)),
        scales=scales.view(-1, tile_scales(columns)),
        quant_map=quant_map,
        codebook="nf4",
        segments=tuple(segments),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """A product's weights, several times, on each side."""

    shape: Shape
    ours: tuple[TiledSet, ...]
    linears: tuple[tuple[Quantized, ...], ...]
    """bitsandbytes', the same codes; nothing where it is missing."""
    stacked: tuple[tuple[Quantized, ...], ...]
    """One weight of all rows; nothing where there is one linear."""


def make_copies(shape: Shape, device: torch.device, count: int, *, made_up: bool) -> Copies:
    """So many copies with weights of their own."""
    quant_map = codebook_of("nf4").to(device)
    linears = [
        tuple(quantize(rows, shape.columns, device, made_up=made_up) for rows in shape.rows)
        for _ in range(count)
    ]
    ours = tuple(tiled(weights, shape, quant_map) for weights in linears)
    stacked = [
        (quantize(sum(shape.rows), shape.columns, device, made_up=False),)
        for _ in range(count if len(shape.rows) > 1 and not made_up else 0)
    ]
    theirs = () if made_up else tuple(linears)
    return Copies(shape=shape, ours=ours, linears=theirs, stacked=tuple(stacked))


def theirs(x: torch.Tensor, weights: Sequence[Quantized]) -> list[torch.Tensor]:
    """bitsandbytes' products, linear by linear."""
    from bitsandbytes import matmul_4bit

    return [matmul_4bit(x, one.codes.t(), quant_state=one.state) for one in weights]


def error(out: torch.Tensor, products: Sequence[torch.Tensor], *, gated: bool) -> float:
    """Relative error of ours against bitsandbytes'."""
    expected = torch.cat([one.float() for one in products], dim=1)
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
    return float((out.float() - expected).norm() / expected.norm())


Launch = Callable[[], object]


def median_us(sides: Sequence[Sequence[Launch]], rounds: int) -> list[float]:
    """Microseconds of a launch of each side, which take turns.

    Args:
        sides: Launches, one for each copy of the weights.
        rounds: Of all copies, in a graph.
    """
    stream = torch.cuda.Stream()
    # Inputs were made on another stream.
    torch.cuda.synchronize()
    graphs = []
    for launches in sides:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            launches[0]()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for run in (*launches,) * rounds:
                    run()
        graphs.append(graph)
    times: list[list[float]] = [[] for _ in sides]
    with torch.cuda.stream(stream):
        for _ in range(_REPEATS):
            for graph, found in zip(graphs, times, strict=True):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # While this one runs, the host puts the other behind it: no launch waits for it.
                graph.replay()
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                found.append(begin.elapsed_time(end))
    return [
        1e3 * median(found) / (rounds * len(launches))
        for found, launches in zip(times, sides, strict=True)
    ]


def measure(copies: Copies, tokens: int, scratch: torch.Tensor) -> dict[str, object]:
    """One product: ours, and bitsandbytes' where it is here."""
    from oomproof.quantization.products_tiled import multiply
    from oomproof.quantization.products_wide import ChainEnds

    shape, device = copies.shape, scratch.device
    gated = shape.in_turn
    x = torch.randn(tokens, shape.columns, dtype=torch.bfloat16, device=device)
    out = x.new_empty(tokens, sum(shape.rows) // (2 if gated else 1))
    chain = ChainEnds.alone(device)
    ours = [
        partial(multiply, x, one, out, scratch, gated=gated, chain=chain) for one in copies.ours
    ]
    differs = None
    if copies.linears:
        ours[0]()
        differs = error(out, theirs(x, copies.linears[0]), gated=gated)
    sides: dict[str, Sequence[Launch]] = {"ours": ours}
    if copies.linears:
        sides["bitsandbytes"] = [partial(theirs, x, weights) for weights in copies.linears]
    if copies.stacked:
        sides["bitsandbytes_stacked"] = [partial(theirs, x, weights) for weights in copies.stacked]
    rounds = ceil_div(_LAUNCHES, len(copies.ours))
    found = dict(zip(sides, median_us(list(sides.values()), rounds), strict=True))
    return record(shape, tokens, found, copies=len(copies.ours), relative_error=differs)


def record(
    shape: Shape, tokens: int, us: dict[str, float], *, copies: int, relative_error: float | None
) -> dict[str, object]:
    """What was measured of a product, as it is written."""
    peers = [value for name, value in us.items() if name != "ours"]
    return {
        **asdict(shape),
        "gated": shape.in_turn,
        "tokens": tokens,
        "weight_bytes": shape.weight_bytes,
        "copies": copies,
        "us": us,
        "tb_per_s": {name: shape.weight_bytes / value / 1e6 for name, value in us.items()},
        "relative_error": relative_error,
        "agrees": None if relative_error is None else relative_error <= MOST_ERROR,
        # To bitsandbytes' better way.
        "ratio": min(peers) / us["ours"] if peers else None,
    }


def describe(model: str, row: dict[str, Any]) -> str:
    """A line for whoever waits."""
    speeds = row["tb_per_s"]
    figures = [f"{name} {us:.1f} µs {speeds[name]:.2f} TB/s" for name, us in row["us"].items()]
    ratio = "bitsandbytes is not here" if row["ratio"] is None else f"× {row['ratio']:.2f}"
    size = f"{sum(row['rows'])}×{row['columns']}"
    wrong = f", DIFFERS by {row['relative_error']:.1e}" if row["agrees"] is False else ""
    return f"{model} {row['name']} {size} M {row['tokens']}: {', '.join(figures)}, {ratio}{wrong}"


def run(model: str, tokens: Sequence[int], device: torch.device, *, made_up: bool) -> bool:
    """Prints a line for each product of a model's layer and number of tokens.

    Returns:
        Whether both sides have the same results, bfloat16's rounding aside.
    """
    all_agree = True
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=device)
    where = {"benchmark": "products", "format": FORMAT, "model": model, **machine()}
    for shape in MODELS[model]:
        count = max(2, ceil_div(COLD_BYTES, shape.weight_bytes))
        copies = make_copies(shape, device, count, made_up=made_up)
        for each in tokens:
            row = measure(copies, each, scratch)
            all_agree &= row["agrees"] is not False
            print(json.dumps({**where, **row}), flush=True)
            print(describe(model, row), file=sys.stderr, flush=True)
        del copies
        torch.cuda.empty_cache()
    return all_agree


def main() -> None:
    """Times what is asked for on the first GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="*", default=TOKENS, type=int, choices=range(1, 33))
    parser.add_argument("--alone", action="store_true", help="leave bitsandbytes out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: products are timed on an NVIDIA GPU, and torch sees none")
    from oomproof.quantization.products_tiled import prepare

    device = torch.device("cuda", 0)
    made_up = arguments.alone or find_spec("bitsandbytes") is None
    prepare(torch.bfloat16, torch.uint8, device)
    with torch.inference_mode():
        agree = [
            run(model, arguments.tokens, device, made_up=made_up) for model in arguments.models
        ]
    if not all(agree):
        sys.exit(f"error: results differ by more than {MOST_ERROR:.0e} from bitsandbytes'")


if __name__ == "__main__":
    main()
