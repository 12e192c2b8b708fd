"""Products of a few tokens with tiled 4-bit weights, in CUDA C++ (cuda/product_4bit.cu)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from oomproof.kernels.module import launch, load_modules
from oomproof.quantization.gpus import gpu_of, limits_of
from oomproof.quantization.product_4bit import (
    INPUTS,
    MAX_SEGMENTS,
    PRODUCT_4BIT,
    kernels_of,
    variant_of,
    warps_choices,
)
from oomproof.quantization.product_4bit_wide import prepare_wide
from oomproof.quantization.product_params import (
    NormedInput,
    product_key,
    product_params,
    type_name,
    unit_of,
)
from oomproof.quantization.products_wide import (
    ChainEnds,
    has_wide,
    launch_wide_product,
    wide_pieces,
)
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tiled_launch import (
    MAX_TOKENS,
    TEMPLATES,
    LaunchShape,
    launch_shape,
    partial_bytes,
    template_of,
)
from oomproof.quantization.tuned import tuned_launch, tuned_launches

_FINISH_THREADS = 256
_PAIR = 2


def supports(x: torch.Tensor, weights: TiledSet, scratch_bytes: int) -> bool:
    """Whether the kernel computes such a product."""
    few = len(x) <= MAX_TOKENS and x.dtype in INPUTS
    if not (x.is_cuda and few and computes(weights, x.device)):
        return False
    shape = _shape(1, weights, x.device)
    return shape is not None and partial_bytes(shape, 1, len(weights.codes)) <= scratch_bytes


def computes(weights: TiledSet, device: torch.device) -> bool:
    """Whether there is a launch for one token, so that more can be multiplied in pieces."""
    linears = weights.segments
    strides = {segment.tile_stride for segment in linears}
    one_stream = strides == {1} and len(linears) <= MAX_SEGMENTS
    in_turn = strides == {_PAIR} and len(linears) == _PAIR
    return (one_stream or in_turn) and _shape(1, weights, device) is not None


def gates(weights: TiledSet) -> bool:
    """Whether the set is gate and up that take turns, tile by tile."""
    return unit_of(weights) == _PAIR and len(weights.segments) == _PAIR


def prepare(
    dtype: torch.dtype, scales: torch.dtype, device: torch.device, *, every: bool = False
) -> None:
    """Compiles (or reads) and loads the kernels for inputs and scales of these types.

    Args:
        dtype: Of inputs.
        scales: Of stored scales.
        device: Where they will be launched.
        every: Whether to load all that tuning may choose, and not only what it chose here.

    Raises:
        CudaError: The driver refuses the machine code.
        KernelCompileError: NVRTC refuses the source.
        MissingDependencyError: NVRTC, or Python's way to it, is not installed.
    """
    if dtype not in INPUTS:
        return
    gpu = gpu_of(device)
    processors, shared_limit = limits_of(device)
    known = {
        (product.template, tuned.warps)
        for product, tuned in tuned_launches(gpu).items()
        if (product.processors, product.scales) == (processors, type_name(scales))
    }
    chosen = [
        (template, warps)
        for template in TEMPLATES
        for number, warps in enumerate(warps_choices(template, dtype, scales))
        if number == 0 or every or (template, warps) in known
    ]
    variants = [variant_of(template, dtype, scales, warps) for template, warps in chosen]
    load_modules(PRODUCT_4BIT, variants, gpu.capability)
    with torch.cuda.device(device):
        # The driver is asked about kernels of a context: there may be none yet.
        torch.cuda.synchronize(device)
        for template, warps in chosen:
            product, finish = kernels_of(template, dtype, scales, warps, gpu.capability)
            product.prepare(shared_limit)
            finish.prepare()
        if has_wide(gpu):
            prepare_wide(dtype, scales, shared_limit)


def multiply(
    x: torch.Tensor | NormedInput,
    weights: TiledSet,
    out: torch.Tensor,
    scratch: torch.Tensor,
    *,
    biases: Sequence[torch.Tensor] = (),
    gated: bool = False,
    chain: ChainEnds | None = None,
) -> None:
    """Writes the product of a few tokens with all linears of a set.

    Args:
        x: [tokens, columns], x.stride(1) == 1, in bfloat16 or float16.
        weights: The set.
        out: [tokens, rows]; half of them where `gated`.
        scratch: uint8; what was in it is lost.
        biases: One of each linear, or none.
        gated: Whether silu(first linear) · second is written, and not both.
        chain: For the kernel for many tokens; see launch_wide_product. The other has no use for it.

    Raises:
        CudaError: The driver refuses a launch.
        ValueError: What is asked for has no kernel: see `supports` and `normalises`.
    """
    if gated and unit_of(weights) != _PAIR:
        raise ValueError("only gate and up that take turns, tile by tile, are gated")
    if isinstance(x, torch.Tensor):
        gpu, limits = gpu_of(x.device), limits_of(x.device)
        wide = wide_pieces(len(x), weights, gpu, *limits, scratch.nbytes)
        for first, end, wide_shape in wide:
            rows = slice(first, end)
            launch_wide_product(
                x[rows], weights, out[rows], scratch, wide_shape, biases, gated=gated, chain=chain
            )
        if wide:
            return
    tokens = len(x.hidden if isinstance(x, NormedInput) else x)
    for first, end, shape in _pieces(x, weights, scratch.nbytes):
        part = x if end - first == tokens else _rows(x, first, end)
        launch_product(part, weights, out[first:end], scratch, shape, biases, gated=gated)


def step_linear_4bit(  # noqa: PLR0913, PLR0917 - as the operator
    x: torch.Tensor,
    update: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    hidden_out: torch.Tensor | None,
    eps: float,
    multiplier: float,
    codes: torch.Tensor,
    scales: torch.Tensor,
    quant_map: torch.Tensor | None,
    codebook: str,
    nested: Sequence[torch.Tensor],
    segments: Sequence[int],
    biases: Sequence[torch.Tensor],
    gated: bool,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """See step_operators.step_linear_4bit."""
    weights = TiledSet.of(codes, scales, quant_map, codebook, nested, segments)
    given: torch.Tensor | NormedInput = x
    if norm_weight is not None:
        assert hidden_out is not None
        given = NormedInput(
            hidden=x,
            update=update,
            weight=norm_weight,
            hidden_out=hidden_out,
            eps=eps,
            multiplier=multiplier,
        )
    multiply(given, weights, out, scratch, biases=biases, gated=gated)


def _pieces(
    x: torch.Tensor | NormedInput, weights: TiledSet, scratch_bytes: int
) -> list[tuple[int, int, LaunchShape]]:
    """(first token, end, launch) of pieces for which shared memory and scratch suffice."""
    source = x.hidden if isinstance(x, NormedInput) else x
    tokens, normed = len(source), isinstance(x, NormedInput)
    piece = min(tokens, TEMPLATES[-1])
    while True:
        for shape in _shapes(piece, weights, source, normed=normed):
            if partial_bytes(shape, piece, len(weights.codes)) <= scratch_bytes:
                return [
                    (first, min(first + piece, tokens), shape) for first in range(0, tokens, piece)
                ]
        assert piece > 1, f"{scratch_bytes} bytes of scratch are too few for one token"
        piece = max(template for template in TEMPLATES if template < piece)


def _rows(x: torch.Tensor | NormedInput, first: int, end: int) -> torch.Tensor | NormedInput:
    if isinstance(x, torch.Tensor):
        return x[first:end]
    return NormedInput(
        hidden=x.hidden[first:end],
        update=None if x.update is None else x.update[first:end],
        weight=x.weight,
        hidden_out=x.hidden_out[first:end],
        eps=x.eps,
        multiplier=x.multiplier,
    )


def launch_product(
    x: torch.Tensor | NormedInput,
    weights: TiledSet,
    out: torch.Tensor,
    scratch: torch.Tensor,
    shape: LaunchShape,
    biases: Sequence[torch.Tensor] = (),
    *,
    gated: bool = False,
) -> None:
    """Launches the kernel once, as is said: what `multiply` does with tokens that fit at once.

    Args:
        x: As for `multiply`.
        weights: The set.
        out: As for `multiply`.
        scratch: uint8, at least partial_bytes(shape, …).
        shape: For as many tokens at least; with a NormedInput of one split, and a `template` that
            the kernel normalises.
        biases: As for `multiply`.
        gated: As for `multiply`.

    Raises:
        CudaError: The driver refuses the launch.
        ValueError: There is no kernel that normalises so many tokens.
    """
    normed = isinstance(x, NormedInput)
    if isinstance(x, NormedInput) and (shape.splits > 1 or shape.template > MOST_NORMED):
        raise ValueError(f"no kernel normalises {len(x.hidden)} tokens; see normalises")
    source = x.hidden if isinstance(x, NormedInput) else x
    params = product_params(x, weights, out, scratch, biases, gated=gated)
    params.splits, params.steps = shape.splits, shape.steps
    params.slots, params.most_tiles = shape.slots, shape.most_tiles
    params.units_per_block = shape.units_per_block
    params.blocks_with_more = shape.blocks_with_more
    params.per_step = _reciprocal(shape.steps)
    params.per_last_step = _reciprocal(shape.last_steps)
    if normed:
        params.writers = (1 << (min(shape.blocks, 128).bit_length() - 1)) - 1
    stream = torch.cuda.current_stream(out.device).cuda_stream
    product, finish = kernels_of(
        shape.template,
        source.dtype,
        weights.scales.dtype,
        shape.warps,
        gpu_of(out.device).capability,
    )
    grid = (shape.blocks, shape.splits, 1)
    block = (32 * shape.warps, 1, 1)
    launch(product, grid, block, shape.shared_bytes, params, stream, dependent=True)
    if shape.splits > 1:
        rows = 16 * params.tiles // params.tile_unit
        grid = (-(-rows // _FINISH_THREADS), params.tokens, 1)
        launch(finish, grid, (_FINISH_THREADS, 1, 1), 0, params, stream, dependent=True)


MOST_NORMED = 4
"""Tokens that the kernel normalises by itself at most: with more a kernel of its own is faster, for
here every block normalises all of them."""


def normalises(tokens: int, weights: TiledSet, device: torch.device) -> bool:
    """Whether `multiply` takes a NormedInput of so many tokens."""
    if tokens > MOST_NORMED:
        return False
    shape = _shape(tokens, weights, device)
    return shape is not None and shape.splits == 1


def _shapes(
    tokens: int, weights: TiledSet, source: torch.Tensor, *, normed: bool
) -> Iterator[LaunchShape]:
    """Launches for so many tokens, the better one first: as tuned here, and by the rule."""
    dtype, scales, device = source.dtype, weights.scales.dtype, source.device
    key = product_key(template_of(tokens), weights, limits_of(device)[0], normed=normed)
    tuned = tuned_launch(gpu_of(device), key)
    if (
        tuned is not None
        and tuned.warps in warps_choices(key.template, dtype, scales)
        and not (normed and tuned.splits > 1)
    ):
        shape = _shape(tokens, weights, device, warps=tuned.warps, splits=tuned.splits)
        if shape is not None:
            yield shape
    by_rule = _shape(tokens, weights, device)
    if by_rule is not None:
        yield by_rule


def _shape(
    tokens: int,
    weights: TiledSet,
    device: torch.device,
    *,
    warps: int | None = None,
    splits: int | None = None,
) -> LaunchShape | None:
    processors, shared_limit = limits_of(device)
    return launch_shape(
        tokens=tokens,
        columns=weights.columns,
        tiles=len(weights.codes),
        unit=unit_of(weights),
        processors=processors,
        shared_limit=shared_limit,
        warps=warps,
        splits=splits,
    )


def _reciprocal(steps: int) -> int:
    """2³² / steps, rounded up; 0 for one step, which the kernel knows."""
    return -(-(1 << 32) // steps) & 0xFFFFFFFF
