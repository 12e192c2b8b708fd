"""Codebooks: the values that codes stand for.

Entries are float32 and bit-identical to bitsandbytes' (Dettmers et al., "QLoRA", 2023,
arXiv:2305.14314; "8-bit Optimizers via Block-wise Quantization", 2021, arXiv:2110.02861).
"""

from __future__ import annotations

from functools import cache

import torch

_NF4 = (
    # Quantiles of the standard normal distribution, scaled to [-1, 1] (QLoRA, appendix E).
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4_CODES = (0, 1, 6, 7, 4, 5, 2, 3)
"""fp4's codes of magnitudes, smallest magnitude first."""
# e2m1 in the order of its bit patterns, before it is scaled to [-1, 1].
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4_THRESHOLDS = (
    0.00260417,
    0.0859375,
    0.20833333,
    0.29166667,
    0.4166667,
    0.583333,
    0.8333333,
)
_DYNAMIC_EXPONENTS = 7


@cache
def table_4bit(quant_type: str) -> torch.Tensor:
    """The 16 values of "nf4" or "fp4", by code: float32 [16] on the CPU."""
    if quant_type == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    values = torch.tensor([*_FP4_MAGNITUDES, *(-x for x in _FP4_MAGNITUDES)], dtype=torch.float32)
    return values / values.abs().max() + 0.0  # which makes its second zero positive, as theirs is


@cache
def thresholds_4bit(quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(thresholds, codes): a value above the n-th threshold and not the next has the n-th code.

    For "nf4" values are compared as they are; the thresholds are float32 [15], the midpoints of
    neighbours rounded once. For "fp4" magnitudes are compared, [7], and 8 is added to the code of
    a negative value; the thresholds are those of bitsandbytes' CUDA kernel (csrc/kernels.cu,
    dQuantizeFP4), which are written with six to eight digits: values between two entries follow.
    """
    if quant_type == "fp4":
        return (
            torch.tensor(_FP4_THRESHOLDS, dtype=torch.float32),
            torch.tensor(FP4_CODES, dtype=torch.int64),
        )
    values = torch.tensor(_NF4, dtype=torch.float32).double()
    return ((values[:-1] + values[1:]) / 2).float(), torch.arange(16)


@cache
def table_dynamic() -> torch.Tensor:
    """The 256 values of absmax codes under double quantization: float32 [256], ascending.

    A signed dynamic type: the further from 1, the fewer bits are left for the fraction.
    """
    values = [0.0, 1.0]
    for exponent in range(_DYNAMIC_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        fractions = (edges[:-1] + edges[1:]) / 2
        scale = 10 ** (exponent - _DYNAMIC_EXPONENTS + 1)
        values += (scale * fractions).tolist()
        values += (-scale * fractions).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def codebook_of(name: str) -> torch.Tensor:
    """The 16 values of codes: "nf4", "fp4", or "int4", whose are integers from -8 on."""
    if name == "int4":
        return torch.arange(16, dtype=torch.float32) - 8
    return table_4bit(name)
