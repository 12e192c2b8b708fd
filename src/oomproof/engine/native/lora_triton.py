"""LoRA's products of a decode step in Triton: two launches for each product that is adapted.

The first splits x Aᵀ along the columns, so that a small A is read by enough multiprocessors; its
parts stay in float32. The second adds them up, as many times as it has blocks (they are in the
second cache), multiplies them with B and adds the result to what the base product left. Sums are in
a fixed order: the same bits each time. From Hopper on both are launched before what comes ahead of
them is done, as the engine's own kernels are, and wait for it before they read anything.
"""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from oomproof.memory.adapter import LORA_SPLITS

_COLUMNS = 128
"""Of x and A that a block of the first product multiplies at once."""
_RANKS = 16
_TOKENS = 16
"""Of a block: the fewest that tensor cores multiply. With more the second product has no registers
for all parts that it adds up."""
_ROWS = 64
"""Of B, of a block of the second."""
_MOST_PARTS = 3
_WARPS = 4
_ALONE_TOKENS = 4
"""Up to so many, launches do not overlap."""

Place = tuple[int, int, int]


def down(x: torch.Tensor, a: torch.Tensor, scratch: torch.Tensor) -> None:
    """Parts of x Aᵀ to scratch, float32 [splits, tokens, rank]."""
    tokens, (rank, columns) = len(x), a.shape
    per_split, splits = _splits(columns)
    _down[(splits, triton.cdiv(rank, _RANKS), triton.cdiv(tokens, _TOKENS))](
        x,
        a,
        scratch.view(torch.float32),
        tokens,
        rank,
        x.stride(0),
        columns,
        per_split,
        PRECISION=_precision(x),
        BLOCK_M=_TOKENS,
        BLOCK_R=_RANKS,
        BLOCK_K=_COLUMNS,
        DEPENDENT=_dependent(x),
        num_warps=_WARPS,
        launch_pdl=_dependent(x),
    )


def up(
    scratch: torch.Tensor,
    rank: int,
    b: Sequence[torch.Tensor],
    places: Sequence[Place],
    out: torch.Tensor,
) -> None:
    """Adds the product with every B to its columns of out."""
    tokens = len(out)
    blocks = [triton.cdiv(len(factor), _ROWS) for factor in b]
    # A linear without an adapter has no blocks; its place is never looked at.
    missing = _MOST_PARTS - len(b)
    factors = [*b, *[b[0]] * missing]
    wheres = [*places, *[places[0]] * missing]
    blocks += [0] * missing
    numbers = [
        number
        for factor, (column, first, ranks) in zip(factors, wheres, strict=True)
        for number in (len(factor), column, first, ranks)
    ]
    _up[(sum(blocks), triton.cdiv(tokens, _TOKENS))](
        scratch.view(torch.float32),
        *factors,
        out,
        tokens,
        rank,
        out.stride(0),
        *numbers,
        blocks[0],
        blocks[0] + blocks[1],
        SPLITS=LORA_SPLITS,
        PRECISION=_precision(out),
        BLOCK_M=_TOKENS,
        BLOCK_N=_ROWS,
        BLOCK_R=_RANKS,
        DEPENDENT=_dependent(out),
        num_warps=_WARPS,
        num_stages=1,
        launch_pdl=_dependent(out),
    )


def up_gated(
    scratch: torch.Tensor,
    rank: int,
    b: Sequence[torch.Tensor],
    places: Sequence[Place],
    gate_up: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Gate and up with what their B's add, gated, to out."""
    tokens, width = out.shape
    found = {
        column // width: (factor, first, ranks)
        for factor, (column, first, ranks) in zip(b, places, strict=True)
    }
    none = (b[0], 0, 0)
    (gate, gate_first, gate_ranks), (second, up_first, up_ranks) = (
        found.get(half, none) for half in (0, 1)
    )
    _up_gated[(triton.cdiv(width, _ROWS), triton.cdiv(tokens, _TOKENS))](
        scratch.view(torch.float32),
        gate,
        second,
        gate_up,
        out,
        tokens,
        rank,
        gate_up.stride(0),
        out.stride(0),
        width,
        gate_first,
        gate_ranks,
        up_first,
        up_ranks,
        SPLITS=LORA_SPLITS,
        PRECISION=_precision(out),
        BLOCK_M=_TOKENS,
        BLOCK_N=_ROWS,
        BLOCK_R=_RANKS,
        DEPENDENT=_dependent(out),
        num_warps=_WARPS,
        num_stages=1,
        launch_pdl=_dependent(out),
    )


def _splits(columns: int) -> tuple[int, int]:
    """(Columns of a part, parts): always as many parts; those behind the last column are zeros."""
    per_split = triton.cdiv(triton.cdiv(columns, LORA_SPLITS), _COLUMNS) * _COLUMNS
    return per_split, LORA_SPLITS


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _dependent(x: torch.Tensor) -> bool:
    """Whether launches overlap there (programmatic dependent launch).

    Of one token they lose by it (275 tokens a second of an 8B instead of 289), of eight they gain
    (2,133 instead of 1,981; an H200).
    """
    if not x.is_cuda or len(x) <= _ALONE_TOKENS:
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


@triton.jit
def _begin(DEPENDENT: tl.constexpr):
    """Lets the next kernel be launched, and waits for all that the last one wrote."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


# Numbers that differ from layer to layer, or from step to step, compile no kernel of their own.
@triton.jit(do_not_specialize=["tokens", "rank"])
def _down(
    x,
    a,
    parts,
    tokens,
    rank,
    x_stride,
    columns,
    per_split,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    _begin(DEPENDENT)
    split = tl.program_id(0)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_rows, real_ranks = rows < tokens, ranks < rank
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    first = split * per_split
    end = tl.minimum(first + per_split, columns)
    for start in range(first, end, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        inside = at < end
        left = tl.load(
            x + rows[:, None] * x_stride + at[None, :],
            mask=real_rows[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            a + ranks[:, None] * columns + at[None, :],
            mask=real_ranks[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    place = parts + (split * tokens + rows[:, None]) * rank + ranks[None, :]
    tl.store(place, total, mask=real_rows[:, None] & real_ranks[None, :])


@triton.jit
def _product(
    total,
    parts,
    b,
    tokens,
    rank,
    first_rank,
    count,
    columns,
    end,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The sum of the parts, times rows `columns` of B, added to a total [BLOCK_M, BLOCK_N]."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    for start in range(0, count, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        inside = (rows < tokens)[:, None] & (ranks < count)[None, :]
        low = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            low += tl.load(
                parts + (split * tokens + rows[:, None]) * rank + first_rank + ranks[None, :],
                mask=inside,
                other=0.0,
            )
        factor = tl.load(
            b + columns[:, None] * count + ranks[None, :],
            mask=(columns < end)[:, None] & (ranks < count)[None, :],
            other=0.0,
        )
        total = tl.dot(
            low.to(b.dtype.element_ty), tl.trans(factor), total, input_precision=PRECISION
        )
    return total


@triton.jit
def _add(
    parts,
    b,
    out,
    tokens,
    rank,
    out_stride,
    end,
    first_column,
    first_rank,
    count,
    block,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    place = out + rows[:, None].to(tl.int64) * out_stride + first_column + columns[None, :]
    inside = (rows < tokens)[:, None] & (columns < end)[None, :]
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    total = _product(
        total,
        parts,
        b,
        tokens,
        rank,
        first_rank,
        count,
        columns,
        end,
        SPLITS,
        PRECISION,
        BLOCK_M,
        BLOCK_R,
    )
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        *[
            "tokens",
            "rank",
            "blocks0",
            "blocks1",
            "end0",
            "end1",
            "end2",
            "column0",
            "column1",
            "column2",
        ],
        *["first0", "first1", "first2", "count0", "count1", "count2"],
    ]
)
def _up(
    parts,
    b0,
    b1,
    b2,
    out,
    tokens,
    rank,
    out_stride,
    end0,
    column0,
    first0,
    count0,
    end1,
    column1,
    first1,
    count1,
    end2,
    column2,
    first2,
    count2,
    blocks0,
    blocks1,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    _begin(DEPENDENT)
    block = tl.program_id(0)
    if block < blocks0:
        _add(
            parts,
            b0,
            out,
            tokens,
            rank,
            out_stride,
            end0,
            column0,
            first0,
            count0,
            block,
            SPLITS,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
        )
    elif block < blocks1:
        _add(
            parts,
            b1,
            out,
            tokens,
            rank,
            out_stride,
            end1,
            column1,
            first1,
            count1,
            block - blocks0,
            SPLITS,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
        )
    else:
        _add(
            parts,
            b2,
            out,
            tokens,
            rank,
            out_stride,
            end2,
            column2,
            first2,
            count2,
            block - blocks1,
            SPLITS,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
        )


@triton.jit(
    do_not_specialize=["tokens", "rank", "gate_first", "gate_count", "up_first", "up_count"]
)
def _up_gated(
    parts,
    gate_b,
    up_b,
    gate_up,
    out,
    tokens,
    rank,
    gate_up_stride,
    out_stride,
    width,
    gate_first,
    gate_count,
    up_first,
    up_count,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    _begin(DEPENDENT)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    place = gate_up + rows[:, None].to(tl.int64) * gate_up_stride + columns[None, :]
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    gate = _product(
        gate,
        parts,
        gate_b,
        tokens,
        rank,
        gate_first,
        gate_count,
        columns,
        width,
        SPLITS,
        PRECISION,
        BLOCK_M,
        BLOCK_R,
    )
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    up = _product(
        up,
        parts,
        up_b,
        tokens,
        rank,
        up_first,
        up_count,
        columns,
        width,
        SPLITS,
        PRECISION,
        BLOCK_M,
        BLOCK_R,
    )
    # What is stored between the two where they are not one launch.
    gate = gate.to(out.dtype.element_ty).to(tl.float32)
    up = up.to(out.dtype.element_ty).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    target = out + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)
