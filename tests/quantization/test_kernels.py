"""The Triton kernels: on a GPU (make test-gpu), or small in Triton's interpreter.

test_interpreter.py runs this file in a process with TRITON_INTERPRET=1. There the operators are
replaced by the launchers of the kernels, and tensors are on the CPU.
"""

from __future__ import annotations

import os
from math import gcd

import pytest
import torch

from oomproof.formats import SEARCHED_FORMATS
from oomproof.quantization import operators
from oomproof.quantization.handlers import HANDLERS, handler
from oomproof.quantization.scratch import least_scratch_bytes
from oomproof.quantization.tables import FP4_CODES, table_4bit, thresholds_4bit
from tests.quantization.weights import (
    PRODUCT_ERRORS,
    SHAPES,
    encode_in_slices,
    product_error,
    random_input,
    random_weight,
    same_bits,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
QUANTIZED = sorted(HANDLERS.keys() - {"fp32", "bf16", "fp16"})
# fp4 and fp4-dq differ from these by the numbers in their table; the interpreter is slow.
MULTIPLIED = ["fp8", "int4", "int8", "nf4", "nf4-dq", "nf4-g16"] if INTERPRETED else QUANTIZED
SHAPES_ENCODED = ((1, 1), (3, 21), (33, 192), (34, 96)) if INTERPRETED else (*SHAPES, (130, 96))
DTYPES_ENCODED = (torch.bfloat16, torch.float32, *(() if INTERPRETED else (torch.float16,)))
SHAPES_MULTIPLIED = ((34, 192), (9, 21), (5, 1280), (3, 1028))
SCRATCH_BYTES = 1 << 22

if INTERPRETED:
    from oomproof.quantization import products_cuda, quantize_triton

    for module in (products_cuda, quantize_triton):
        for name in vars(operators).keys() & vars(module).keys():
            if name.startswith(("linear_", "quantize_")):
                setattr(operators, name, getattr(module, name))


def dtypes_of(format_name: str, tokens: int, columns: int) -> tuple[torch.dtype, ...]:
    """Input types; the interpreter multiplies matrices of bfloat16 as if they were integers."""
    in_one_kernel = columns % (4 if format_name in {"int8", "fp8"} else 64) == 0
    alone = tokens == 1 and in_one_kernel
    if INTERPRETED and tokens <= 64 and not alone and format_name != "fp8":
        return (torch.float32, torch.float16)
    if INTERPRETED:
        return (torch.float32, torch.bfloat16) if tokens == 1 else (torch.bfloat16,)
    return (torch.float32, torch.float16, torch.bfloat16)


def same_codes(format_name: str, name: str, part: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a part is the reference's.

    On a GPU fp4's codes are bitsandbytes' own, bit for bit (test_linear.py), whose kernels divide
    approximately: a value that meets a threshold to rounding may get the neighbour's code.
    """
    if name != "weight" or not format_name.startswith("fp4") or INTERPRETED:
        return same_bits(part, expected)
    return int(ranks_apart(part, expected).max()) <= 1


def ranks_apart(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """How many steps of fp4's magnitudes lie between codes of the same sign; 16 with another's."""
    rank = torch.empty(8, dtype=torch.int64)
    rank[list(FP4_CODES)] = torch.arange(8)
    codes = [torch.stack((p.cpu() >> 4, p.cpu() & 15)).long() for p in (left, right)]
    ranks = [rank[code & 7] for code in codes]
    apart = (ranks[0] - ranks[1]).abs()
    other_sign = (codes[0] & 8) != (codes[1] & 8)
    return torch.where(other_sign & (ranks[0] + ranks[1] > 0), 16, apart)


@pytest.mark.parametrize("format_name", QUANTIZED)
@pytest.mark.parametrize("shape", SHAPES_ENCODED)
@pytest.mark.parametrize("dtype", DTYPES_ENCODED)
def test_codes_and_scales_are_the_references_bit_for_bit(
    format_name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(shape, dtype, seed=sum(shape)).to(DEVICE)
    expected = handler(format_name).encode(weight)
    unit = 128 // gcd(128, shape[1])
    for rows_of_slice in {3 * unit, shape[0]}:
        parts = encode_in_slices(format_name, weight, rows_of_slice)
        for name, part in parts.items():
            assert same_codes(format_name, name, part, expected[name]), (name, rows_of_slice)


@pytest.mark.parametrize("columns", [21, 63, 65])
def test_slices_of_int4_begin_in_the_middle_of_bytes(columns: int) -> None:
    weight = random_weight((7, columns), seed=columns).to(DEVICE)
    expected = handler("int4").encode(weight)
    for rows_of_slice in (1, 3):
        parts = encode_in_slices("int4", weight, rows_of_slice)
        assert all(same_bits(part, expected[name]) for name, part in parts.items())


@pytest.mark.parametrize("format_name", QUANTIZED)
def test_hard_values_are_quantized_as_the_reference_does(format_name: str) -> None:
    """Zeros, thresholds and ties, tiny and huge numbers, and every step of e4m3."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(8, 4096, generator=generator)
    rows = [
        torch.zeros(4096),
        random[0] * 2.0 ** torch.linspace(-40, 20, 4096),
        random[1] * 1e-39,
        random[2] * 1e30,
        torch.arange(4096) / 2048 - 1,
        (torch.arange(4096) % 255 - 127) / 127 + (torch.arange(4096) % 2) / 254,
        *(table_4bit(name).repeat(256) + 0.5 * random[3] for name in ("nf4", "fp4")),
        thresholds_4bit("nf4")[0].repeat(300)[:4096],
    ]
    weight = torch.stack(rows)
    # Peaks of 1 and of 448 / 448, so that codes and thresholds are met exactly.
    weight[4:, ::64] = 1.0
    if format_name.startswith("fp4") and not INTERPRETED:
        # As bitsandbytes' own, its division on a GPU knows no peaks below the least normal number.
        weight = torch.cat((weight[:2], weight[3:]))
    weight = weight.to(DEVICE)
    expected = handler(format_name).encode(weight)
    parts = encode_in_slices(format_name, weight, len(weight))
    for name, part in parts.items():
        assert same_codes(format_name, name, part, expected[name]), name


@pytest.mark.parametrize("format_name", ["nf4", "int8", "fp8", "int4"])
def test_a_nan_among_the_weights_reaches_its_scale(format_name: str) -> None:
    weight = random_weight((4, 128))
    weight[2, 5] = float("nan")
    parts = encode_in_slices(format_name, weight.to(DEVICE), 4)
    scale = parts["absmax" if format_name == "nf4" else "scale"].view(4, -1)
    assert scale.isnan().any(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("format_name", MULTIPLIED)
@pytest.mark.parametrize("tokens", [1, 7, 33, 65, 130])
@pytest.mark.parametrize("shape", SHAPES_MULTIPLIED)
def test_products_are_exact_to_rounding(
    format_name: str, tokens: int, shape: tuple[int, int]
) -> None:
    if INTERPRETED and tokens in {33, 130} and shape != (34, 192):
        pytest.skip("the path of 7 or of 65 tokens again")
    parts = encode_in_slices(format_name, random_weight(shape).to(DEVICE), shape[0])
    for dtype in dtypes_of(format_name, tokens, shape[1]):
        x = random_input(tokens, shape[1], dtype).to(DEVICE)
        error = product_error(format_name, x, parts, shape, SCRATCH_BYTES)
        assert error < PRODUCT_ERRORS[dtype], dtype


@pytest.mark.parametrize("format_name", MULTIPLIED)
@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_the_least_scratch_is_enough_for_the_kernels(format_name: str, tokens: int) -> None:
    shape = (6, 320)
    parts = encode_in_slices(format_name, random_weight(shape).to(DEVICE), shape[0])
    least = least_scratch_bytes(format_name, tokens, *shape)
    if INTERPRETED and format_name == "fp8":
        # A token at a time takes the interpreter long.
        least *= 8
    x = random_input(tokens, shape[1], torch.float16).to(DEVICE)
    assert product_error(format_name, x, parts, shape, least) < PRODUCT_ERRORS[torch.float16]


def test_too_little_scratch_is_refused_with_both_sizes() -> None:
    parts = encode_in_slices("int8", random_weight((4, 4096)).to(DEVICE), 4)
    x = random_input(65, 4096, torch.float16).to(DEVICE)
    with pytest.raises(ValueError, match=r"scratch has \d+ bytes left"):
        product_error("int8", x, parts, (4, 4096), 4096)


def test_a_token_with_a_nan_is_nan_in_fp8() -> None:
    parts = encode_in_slices("fp8", random_weight((8, 64)).to(DEVICE), 8)
    for tokens in (1, 3, 66):
        x = torch.ones(tokens, 64, device=DEVICE)
        x[-1, 7] = float("nan")
        out = torch.zeros(tokens, 8, device=DEVICE)
        scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=DEVICE)
        handler("fp8").multiply(x, parts, (8, 64), out, scratch)
        assert out[-1].isnan().all()
        assert not out[:-1].isnan().any()


@on_a_gpu
@pytest.mark.parametrize("format_name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_of_a_large_weight_are_the_references(format_name: str, dtype: torch.dtype) -> None:
    weight = random_weight((3000, 4096), dtype).cuda()
    expected = handler(format_name).encode(weight)
    parts = encode_in_slices(format_name, weight, 1024)
    for name, part in parts.items():
        assert same_codes(format_name, name, part, expected[name]), name


@on_a_gpu
@pytest.mark.parametrize("format_name", sorted(HANDLERS))
@pytest.mark.parametrize("tokens", [1, 2, 16, 48, 64, 65, 300])
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 14336), (3000, 2112)])
def test_products_of_large_weights_are_exact_to_rounding(
    format_name: str, tokens: int, shape: tuple[int, int]
) -> None:
    parts = handler(format_name).encode(random_weight(shape).cuda())
    for dtype in (torch.bfloat16, torch.float16):
        x = random_input(tokens, shape[1], dtype).cuda()
        error = product_error(format_name, x, parts, shape, 8 * SCRATCH_BYTES)
        assert error < PRODUCT_ERRORS[dtype], dtype


@on_a_gpu
@pytest.mark.parametrize("format_name", sorted(HANDLERS))
def test_the_same_input_gives_the_same_bits(format_name: str) -> None:
    # Partial sums are added in order.
    parts = handler(format_name).encode(random_weight((512, 8192)).cuda())
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
    for tokens in (1, 8, 64, 200):
        x = random_input(tokens, 8192, torch.bfloat16).cuda()
        outs = [torch.empty(tokens, 512, dtype=x.dtype, device="cuda") for _ in range(3)]
        for out in outs:
            handler(format_name).multiply(x, parts, (512, 8192), out, scratch)
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


@on_a_gpu
@pytest.mark.parametrize("format_name", sorted(HANDLERS))
def test_a_product_allocates_nothing(format_name: str) -> None:
    shape = (1024, 4096)
    dtype = torch.float16 if format_name == "fp16" else torch.bfloat16
    parts = handler(format_name).encode(random_weight(shape).cuda())
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
    for tokens in (1, 8, 64, 65, 1000):
        x = random_input(tokens, shape[1], dtype).cuda()
        wide = torch.empty(tokens, 3 * shape[0], dtype=dtype, device="cuda")
        out = wide[:, shape[0] : 2 * shape[0]]
        # The first time loads kernels, and makes cuBLAS's workspace.
        handler(format_name).multiply(x, parts, shape, out, scratch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        handler(format_name).multiply(x, parts, shape, out, scratch)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert torch.cuda.max_memory_allocated() == before, tokens


@on_a_gpu
@pytest.mark.parametrize("format_name", QUANTIZED)
def test_quantizing_slices_allocates_nothing_that_stays(format_name: str) -> None:
    weight = random_weight((1024, 4096)).cuda()
    found = handler(format_name)
    parts = encode_in_slices(format_name, weight, 512)
    workspace = torch.empty(found.workspace_numel((1024, 4096)), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for first in (0, 512):
        found.encode_slice(weight[first : first + 512], parts, first, (1024, 4096), workspace)
    assert torch.cuda.max_memory_allocated() == before
    found.finish(parts, (1024, 4096), workspace)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@on_a_gpu
@pytest.mark.parametrize("format_name", sorted(HANDLERS))
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_product_runs_in_a_cuda_graph(format_name: str, tokens: int) -> None:
    shape = (1024, 4096)
    dtype = torch.float16 if format_name == "fp16" else torch.bfloat16
    parts = handler(format_name).encode(random_weight(shape).cuda())
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
    x = random_input(tokens, shape[1], dtype).cuda()
    out, eager = (torch.empty(tokens, shape[0], dtype=dtype, device="cuda") for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        handler(format_name).multiply(x, parts, shape, out, scratch)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        handler(format_name).multiply(x, parts, shape, out, scratch)
    for factor in (1.0, -0.5):
        x *= factor
        graph.replay()
        handler(format_name).multiply(x, parts, shape, eager, scratch)
        assert torch.equal(out, eager)


@pytest.mark.parametrize("format_name", SEARCHED_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES_ENCODED)
def test_searched_scales_and_codes_are_the_references(format_name: str, dtype: torch.dtype) -> None:
    """Bit for bit, fp4 too: the search has no approximate division."""
    for shape in SHAPES_ENCODED:
        tailed = random_weight(shape, torch.float32, seed=7) / random_weight(shape, seed=8).float()
        tailed = tailed.clamp(-6e4, 6e4)  # finite in float16, as what is loaded has to be
        for weight in (random_weight(shape, dtype, seed=sum(shape)), tailed.to(dtype)):
            expected = handler(format_name, search=True).encode(weight)
            parts = encode_in_slices(format_name, weight.to(DEVICE), shape[0], search=True)
            for name, part in parts.items():
                nested = "nested_absmax" in parts
                if nested and name in {"absmax", "nested_absmax", "nested_offset"}:
                    continue  # the mean is torch's own, in another order on a GPU
                assert same_bits(part.cpu(), expected[name]), (name, shape)
