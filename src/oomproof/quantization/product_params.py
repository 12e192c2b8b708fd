"""What a product of a few tokens with tiled 4-bit weights is told, however it is divided."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from oomproof.quantization.product_4bit import Params
from oomproof.quantization.tables import codebook_of
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tuned import ProductKey

_CANDIDATES = 4096


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


def product_params(
    x: torch.Tensor | NormedInput,
    weights: TiledSet,
    out: torch.Tensor,
    scratch: torch.Tensor,
    biases: Sequence[torch.Tensor],
    *,
    gated: bool,
) -> Params:
    """All parameters but those that say how work is divided."""
    normed = isinstance(x, NormedInput)
    source = x.hidden if isinstance(x, NormedInput) else x
    levels, level_scale = scaled_levels(weights.codebook, source.dtype)
    params = Params(
        codes=weights.codes.data_ptr(),
        scales=weights.scales.data_ptr(),
        out=out.data_ptr(),
        partials=scratch.data_ptr(),
        num_segments=len(weights.segments),
        tokens=len(source),
        columns=weights.columns,
        tiles=len(weights.codes),
        x_stride=0 if normed else source.stride(0),
        out_stride=out.stride(0),
        tile_unit=unit_of(weights),
        gated=gated,
        levels=levels,
        level_scale=level_scale,
    )
    if isinstance(x, NormedInput):
        params.hidden, params.hidden_out = x.hidden.data_ptr(), x.hidden_out.data_ptr()
        params.norm_weight = x.weight.data_ptr()
        params.eps, params.multiplier = x.eps, x.multiplier
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
    return params


def unit_of(weights: TiledSet) -> int:
    """Tiles that belong together: 2 where gate and up take turns."""
    return weights.segments[0].tile_stride


def product_key(template: int, weights: TiledSet, processors: int, *, normed: bool) -> ProductKey:
    """What a product is called in the table of tuned launches."""
    return ProductKey(
        processors=processors,
        scales=type_name(weights.scales.dtype),
        normed=normed,
        template=template,
        columns=weights.columns,
        tiles=len(weights.codes),
        unit=unit_of(weights),
    )


def type_name(dtype: torch.dtype) -> str:
    """Such as "uint8"."""
    return str(dtype).removeprefix("torch.")


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
