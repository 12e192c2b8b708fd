"""Products of a few tokens with tiled 4-bit weights, in CUDA C++ (cuda/product_4bit.cu)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from oomproof.kernels.module import Kernel, launch, load_modules
from oomproof.kernels.source import Source, Variant
from oomproof.quantization.tables import table_4bit
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tiled_launch import (
    LEAST_SHARED_BYTES,
    MAX_TOKENS,
    TEMPLATES,
    LaunchShape,
    launch_shape,
    partial_bytes,
    warps_of,
)

_INPUTS = (torch.bfloat16, torch.float16)
_SCALES = (torch.float32, torch.uint8, torch.bfloat16)
_MAX_SEGMENTS = 3
_CANDIDATES = 4096
_FINISH_THREADS = 256
_PAIR = 2


class Segment(ctypes.Structure):
    """One linear of the set."""

    _fields_ = (
        ("nested_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("first_tile", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class Params(ctypes.Structure):
    """What both kernels take; product_4bit.cu says what each field is."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "codes",
                "scales",
                "nested_map",
                "x",
                "hidden",
                "update",
                "norm_weight",
                "hidden_out",
                "out",
                "partials",
            )
        ),
        ("segments", Segment * _MAX_SEGMENTS),
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_segments",
                "tokens",
                "columns",
                "tiles",
                "x_stride",
                "out_stride",
                "splits",
                "steps",
                "tile_unit",
                "gated",
                "writers",
                "slots",
                "most_tiles",
                "units_per_block",
                "blocks_with_more",
            )
        ),
        ("per_step", ctypes.c_uint32),
        ("per_last_step", ctypes.c_uint32),
        ("levels", ctypes.c_uint16 * 16),
        ("level_scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("multiplier", ctypes.c_float),
    )


def _variant(template: int, dtype: torch.dtype, scales: torch.dtype) -> Variant:
    return Variant(
        defines={
            "TOKENS": template,
            "INPUT": _INPUTS.index(dtype),
            "SCALES": _SCALES.index(scales),
            "WARPS": warps_of(template),
            "DEPTH": 1,
            "BLOCKS": 1,
        },
        shared_bytes=LEAST_SHARED_BYTES,
    )


PRODUCT_4BIT = Source(
    path="quantization/cuda/product_4bit.cu",
    variants=tuple(
        _variant(template, dtype, scales)
        for template in TEMPLATES
        for dtype in _INPUTS
        for scales in _SCALES
    ),
    parameters=(Params,),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormedInput:
    """What is multiplied is RMSNorm(hidden + multiplier · update) · weight."""

    hidden: torch.Tensor
    """[tokens, columns], contiguous."""
    update: torch.Tensor | None
    """[tokens, columns]."""
    weight: torch.Tensor
    """[columns]."""
    hidden_out: torch.Tensor
    """The sum [tokens, columns], contiguous; another tensor than `hidden`."""
    eps: float
    multiplier: float


def supports(x: torch.Tensor, weights: TiledSet, scratch_bytes: int) -> bool:
    """Whether the kernel computes such a product."""
    few = len(x) <= MAX_TOKENS and x.dtype in _INPUTS
    if not (x.is_cuda and few and computes(weights, x.device)):
        return False
    shape = _shape(1, weights, x.device)
    return shape is not None and partial_bytes(shape, 1, len(weights.codes)) <= scratch_bytes


def computes(weights: TiledSet, device: torch.device) -> bool:
    """Whether there is a launch for one token, so that more can be multiplied in pieces."""
    linears = weights.segments
    strides = {segment.tile_stride for segment in linears}
    one_stream = strides == {1} and len(linears) <= _MAX_SEGMENTS
    in_turn = strides == {_PAIR} and len(linears) == _PAIR
    return (one_stream or in_turn) and _shape(1, weights, device) is not None


def prepare(dtype: torch.dtype, scales: torch.dtype, device: torch.device) -> None:
    """Compiles (or reads) and loads every kernel for inputs and scales of these types.

    Raises:
        CudaError: The driver refuses the machine code.
        KernelCompileError: NVRTC refuses the source.
        MissingDependencyError: NVRTC, or Python's way to it, is not installed.
    """
    if dtype not in _INPUTS:
        return
    capability = torch.cuda.get_device_capability(device)
    load_modules(
        PRODUCT_4BIT, [_variant(template, dtype, scales) for template in TEMPLATES], capability
    )
    _, shared_limit = _limits(device)
    with torch.cuda.device(device):
        for template in TEMPLATES:
            product, finish = _kernels(template, dtype, scales, capability)
            product.prepare(shared_limit)
            finish.prepare()


def multiply(
    x: torch.Tensor | NormedInput,
    weights: TiledSet,
    out: torch.Tensor,
    scratch: torch.Tensor,
    *,
    biases: Sequence[torch.Tensor] = (),
    gated: bool = False,
) -> None:
    """Writes the product of a few tokens with all linears of a set.

    Args:
        x: [tokens, columns], x.stride(1) == 1, in bfloat16 or float16.
        weights: The set.
        out: [tokens, rows]; half of them where `gated`.
        scratch: uint8; what was in it is lost.
        biases: One of each linear, or none.
        gated: Whether silu(first linear) · second is written, and not both.

    Raises:
        CudaError: The driver refuses a launch.
        ValueError: What is asked for has no kernel: see `supports` and `normalises`.
    """
    if gated and _unit(weights) != _PAIR:
        raise ValueError("only gate and up that take turns, tile by tile, are gated")
    tokens = len(x.hidden if isinstance(x, NormedInput) else x)
    for first, end, shape in _pieces(tokens, weights, out.device, scratch.nbytes):
        part = x if end - first == tokens else _rows(x, first, end)
        _multiply(part, weights, out[first:end], scratch, shape, biases, gated=gated)


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
    tokens: int, weights: TiledSet, device: torch.device, scratch_bytes: int
) -> list[tuple[int, int, LaunchShape]]:
    """(first token, end, launch) of pieces for which shared memory and scratch suffice."""
    piece = min(tokens, TEMPLATES[-1])
    while True:
        shape = _shape(piece, weights, device)
        fits = (
            shape is not None and partial_bytes(shape, piece, len(weights.codes)) <= scratch_bytes
        )
        if fits or piece == 1:
            break
        piece = max(template for template in TEMPLATES if template < piece)
    assert shape is not None, "one token fits into the least shared memory"
    assert fits, f"{scratch_bytes} bytes of scratch are too few for one token"
    if piece == tokens:
        return [(0, tokens, shape)]
    return [(first, min(first + piece, tokens), shape) for first in range(0, tokens, piece)]


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


def _multiply(
    x: torch.Tensor | NormedInput,
    weights: TiledSet,
    out: torch.Tensor,
    scratch: torch.Tensor,
    shape: LaunchShape,
    biases: Sequence[torch.Tensor],
    *,
    gated: bool,
) -> None:
    normed = isinstance(x, NormedInput)
    if isinstance(x, NormedInput) and (shape.splits > 1 or shape.template > _MOST_NORMED):
        raise ValueError(f"no kernel normalises {len(x.hidden)} tokens; see normalises")
    source = x.hidden if isinstance(x, NormedInput) else x
    tokens, tiles, unit = len(source), len(weights.codes), _unit(weights)
    levels, level_scale = scaled_levels(weights.codebook, source.dtype)
    params = Params(
        codes=weights.codes.data_ptr(),
        scales=weights.scales.data_ptr(),
        out=out.data_ptr(),
        partials=scratch.data_ptr(),
        num_segments=len(weights.segments),
        tokens=tokens,
        columns=weights.columns,
        tiles=tiles,
        x_stride=0 if normed else source.stride(0),
        out_stride=out.stride(0),
        splits=shape.splits,
        steps=shape.steps,
        tile_unit=unit,
        gated=gated,
        slots=shape.slots,
        most_tiles=shape.most_tiles,
        units_per_block=shape.units_per_block,
        blocks_with_more=shape.blocks_with_more,
        per_step=_reciprocal(shape.steps),
        per_last_step=_reciprocal(shape.last_steps),
        levels=levels,
        level_scale=level_scale,
    )
    if isinstance(x, NormedInput):
        params.hidden, params.hidden_out = x.hidden.data_ptr(), x.hidden_out.data_ptr()
        params.norm_weight = x.weight.data_ptr()
        params.eps, params.multiplier = x.eps, x.multiplier
        params.writers = (1 << (min(shape.blocks, 128).bit_length() - 1)) - 1
        if x.update is not None:
            params.update, params.x_stride = x.update.data_ptr(), x.update.stride(0)
    else:
        params.x = x.data_ptr()
    for number, segment in enumerate(weights.segments):
        own = params.segments[number]
        own.first_tile = segment.first_tile
        if segment.nested is not None:
            absmax, nested_map, offset = segment.nested
            own.nested_absmax, own.offset = absmax.data_ptr(), offset.data_ptr()
            params.nested_map = nested_map.data_ptr()
        if biases:
            own.bias = biases[number].data_ptr()
    stream = torch.cuda.current_stream(out.device).cuda_stream
    product, finish = _kernels(shape.template, source.dtype, weights.scales.dtype, _capability(out))
    grid = (shape.blocks, shape.splits, 1)
    block = (32 * shape.warps, 1, 1)
    launch(product, grid, block, shape.shared_bytes, params, stream, dependent=True)
    if shape.splits > 1:
        rows = 16 * tiles // unit
        grid = (-(-rows // _FINISH_THREADS), tokens, 1)
        launch(finish, grid, (_FINISH_THREADS, 1, 1), 0, params, stream, dependent=True)


_MOST_NORMED = 8
"""Tokens that the kernel normalises by itself at most."""


def normalises(tokens: int, weights: TiledSet, device: torch.device) -> bool:
    """Whether `multiply` takes a NormedInput of so many tokens."""
    if tokens > _MOST_NORMED:
        return False
    shape = _shape(tokens, weights, device)
    return shape is not None and shape.splits == 1


def _shape(tokens: int, weights: TiledSet, device: torch.device) -> LaunchShape | None:
    processors, shared_limit = _limits(device)
    return launch_shape(
        tokens=tokens,
        columns=weights.columns,
        tiles=len(weights.codes),
        unit=_unit(weights),
        processors=processors,
        shared_limit=shared_limit,
    )


@cache
def scaled_levels(codebook: str, dtype: torch.dtype) -> tuple[ctypes.Array[ctypes.c_uint16], float]:
    """The codebook in the input's type, times a number at which its rounding is least.

    Without it a level of nf4 is off by up to 2⁻⁹ in bfloat16, for every weight that has it. The
    sums are multiplied with the number's inverse, in float32.

    Returns:
        Bits of the 16 levels, and what the sums are multiplied with.
    """
    levels = codebook_of(codebook).double()
    factors = torch.linspace(0.5, 1.0, _CANDIDATES + 1, dtype=torch.float64)[1:, None]
    rounded = (levels * factors).float().to(dtype)
    errors = (rounded.double() / factors - levels) / levels.abs().clamp(min=1e-9)
    best = int(errors.square().sum(dim=1).argmin())
    bits = rounded[best].view(torch.int16).int() & 0xFFFF
    return (ctypes.c_uint16 * 16)(*bits.tolist()), 1 / float(factors[best])


def codebook_of(name: str) -> torch.Tensor:
    """The 16 values of codes: "nf4", "fp4", or "int4", whose are integers from -8 on."""
    if name == "int4":
        return torch.arange(16, dtype=torch.float32) - 8
    return table_4bit(name)


@cache
def _kernels(
    template: int, dtype: torch.dtype, scales: torch.dtype, capability: tuple[int, int]
) -> tuple[Kernel, Kernel]:
    [module] = load_modules(PRODUCT_4BIT, [_variant(template, dtype, scales)], capability)
    return module.kernel("product_4bit", Params), module.kernel("finish_4bit", Params)


@cache
def _limits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory that a block may have)."""
    properties = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return properties.multi_processor_count, shared


def _capability(tensor: torch.Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device)


def _unit(weights: TiledSet) -> int:
    return weights.segments[0].tile_stride


def _reciprocal(steps: int) -> int:
    """2³² / steps, rounded up; 0 for one step, which the kernel knows."""
    return -(-(1 << 32) // steps) & 0xFFFFFFFF
