"""Weights in their formats: bitsandbytes' bits, the planned bytes, and an error within bounds."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from oomproof.errors import InputError
from oomproof.formats import FORMATS
from oomproof.quantization.linear import HANDLERS, QuantizedLinear, handler
from oomproof.quantization.reference import unpack
from oomproof.quantization.tables import table_4bit, table_dynamic

law = settings(deadline=None, derandomize=True, max_examples=40)
SHAPES = ((64, 64), (96, 160), (8, 1), (1, 1), (3, 21), (65, 63), (128, 512))
TABLES = ("nf4", "nf4-dq", "fp4", "fp4-dq")


def weight_of(
    shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(shape, generator=generator)).to(dtype)


def theirs(weight: torch.Tensor, format_name: str) -> dict[str, torch.Tensor]:
    """bitsandbytes' codes and statistics of a weight, under the names of our components."""
    codes, state = bnb.quantize_4bit(
        weight,
        blocksize=64,
        quant_type=format_name[:3],
        compress_statistics=format_name.endswith("-dq"),
    )
    parts = {"weight": codes.reshape(-1), "absmax": state.absmax, "quant_map": state.code}
    if state.nested:
        parts |= {
            "nested_absmax": state.state2.absmax,
            "nested_quant_map": state.state2.code,
            "nested_offset": state.offset,
        }
    return parts


def test_tables_are_bitsandbytes_own() -> None:
    for quant_type in ("nf4", "fp4"):
        assert torch.equal(table_4bit(quant_type), bnb.get_4bit_type(quant_type, device="cpu"))
    assert torch.equal(table_dynamic(), bnb.create_dynamic_map())


@pytest.mark.parametrize("format_name", TABLES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_and_scales_are_bit_identical_to_bitsandbytes(
    format_name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = weight_of(shape, dtype, seed=sum(shape))
    ours = handler(format_name).encode(weight)
    expected = theirs(weight, format_name)
    assert ours.keys() == expected.keys()
    for name, part in ours.items():
        other = expected[name].reshape(part.shape)
        assert part.dtype == other.dtype, name
        if name == "absmax" and format_name.endswith("-dq"):
            # bitsandbytes' kernel for processors misses the nearest code now and then, by one;
            # where the nested absmax is 0 any code means 0.
            apart = (part.int() - other.int()).abs()
            apart[ours["nested_absmax"].repeat_interleave(256)[: part.numel()] == 0] = 0
            assert int(apart.max()) <= 1
            assert float((apart > 0).float().mean()) < 0.01
        elif name == "weight" and format_name.startswith("fp4"):
            # On a processor it gives either of fp4's two zeros; we follow its CUDA kernel.
            zeros = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, *range(9, 16)], dtype=torch.uint8)
            codes, expected_codes = (zeros[unpack(p).long()] for p in (part, other))
            assert float((codes != expected_codes).float().mean()) < 1e-3
        else:
            assert torch.equal(part, other), name


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", TABLES)
@pytest.mark.parametrize("shape", [(64, 64), (96, 160), (1024, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_and_scales_are_bit_identical_on_a_gpu(
    format_name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = weight_of(shape, dtype).cuda()
    held = handler(format_name)
    # As a checkpoint is loaded: by the kernels, into final places.
    ours = {name: torch.zeros_like(part) for name, part in held.encode(weight).items()}
    workspace = torch.empty(max(1, held.workspace_numel(shape)), device="cuda")
    held.encode_slice(weight, ours, 0, shape, workspace)
    held.finish(ours, shape, workspace)
    expected = theirs(weight, format_name)
    for name, part in ours.items():
        assert torch.equal(part, expected[name].reshape(part.shape)), name


@pytest.mark.parametrize("format_name", TABLES)
def test_a_weight_comes_back_as_bitsandbytes_gives_it_back(format_name: str) -> None:
    # Columns of whole blocks: with others bitsandbytes 0.50 gives wrong values on a processor.
    weight = weight_of((96, 192))
    layer = QuantizedLinear.from_weight(weight, format_name)
    codes, state = bnb.quantize_4bit(
        weight, quant_type=format_name[:3], compress_statistics=format_name.endswith("-dq")
    )
    expected = bnb.dequantize_4bit(codes, state)
    # Codes of absmax may be one apart, and fp4's ties fall otherwise (see above).
    tolerance = 1e-6 if format_name == "nf4" else 0.02
    found = layer.dequantize(torch.bfloat16)
    assert (found - expected).float().norm() <= tolerance * expected.float().norm()


@pytest.mark.parametrize("format_name", TABLES)
def test_blocks_that_run_over_the_end_of_a_row_come_back_too(format_name: str) -> None:
    weight = weight_of((96, 160), torch.float32)
    layer = QuantizedLinear.from_weight(weight, format_name)
    assert (layer.dequantize(torch.float32) - weight).norm() < 0.14 * weight.norm()


@law
@given(
    st.sampled_from(sorted(HANDLERS)),
    st.tuples(st.integers(1, 40), st.integers(1, 150)),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_a_layer_holds_the_bytes_of_the_memory_model(
    format_name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = QuantizedLinear.from_weight(weight_of(shape, dtype), format_name)
    planned = {part.name: part for part in FORMATS[format_name].components(*shape)}
    assert layer.parts.keys() == planned.keys()
    for name, part in layer.parts.items():
        assert part.numel() == planned[name].numel
        assert str(part.dtype).removeprefix("torch.") == planned[name].dtype
    assert layer.stored_bytes == FORMATS[format_name].stored_bytes(*shape)


@pytest.mark.parametrize("format_name", sorted(HANDLERS))
@pytest.mark.parametrize("shape", [(64, 128), (3, 21)])
def test_the_sizes_that_operators_declare_are_those_they_make(
    format_name: str, shape: tuple[int, int]
) -> None:
    real = QuantizedLinear.from_weight(weight_of(shape), format_name)
    x = torch.ones(2, shape[1], dtype=torch.bfloat16)
    product = real(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        encoded = handler(format_name).encode(mode.from_tensor(weight_of(shape)))
        for name, part in real.parts.items():
            assert encoded[name].numel() == part.numel(), name
            assert encoded[name].dtype == part.dtype, name
        fake = QuantizedLinear(format_name, encoded, shape)
        declared = fake(mode.from_tensor(x))
        assert declared.shape == product.shape
        assert declared.dtype == product.dtype


@pytest.mark.parametrize("format_name", sorted(HANDLERS))
def test_a_product_is_that_of_the_dequantized_weight(format_name: str) -> None:
    layer = QuantizedLinear.from_weight(weight_of((48, 192), torch.float32), format_name)
    x = torch.randn(2, 5, 192, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(x, layer.dequantize(torch.float32))
    # FP8 rounds its inputs to three bits of fraction too.
    tolerance = 0.04 if format_name == "fp8" else 1e-5
    assert layer(x).shape == (2, 5, 48)
    assert (layer(x) - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    ("format_name", "most"),
    [("bf16", 0.003), ("int8", 0.012), ("fp8", 0.03), ("nf4", 0.10), ("int4", 0.13), ("fp4", 0.14)],
)
def test_the_error_of_a_format_is_within_what_its_bits_allow(format_name: str, most: float) -> None:
    weight = weight_of((256, 512), torch.float32)
    layer = QuantizedLinear.from_weight(weight, format_name)
    error = (layer.dequantize(torch.float32) - weight).norm() / weight.norm()
    assert most / 3 < error < most


@law
@given(st.sampled_from(sorted(HANDLERS)), st.floats(-6, 4))
def test_formats_follow_the_scale_of_a_weight(format_name: str, exponent: float) -> None:
    scale = 2.0 ** round(exponent)
    weight = weight_of((8, 64), torch.float32)
    one, other = (
        QuantizedLinear.from_weight(weight * factor, format_name).dequantize(torch.float32)
        for factor in (1.0, scale)
    )
    assert torch.allclose(one * scale, other, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("format_name", sorted(HANDLERS))
def test_a_weight_of_zeros_stays_zero(format_name: str) -> None:
    layer = QuantizedLinear.from_weight(torch.zeros(4, 128), format_name)
    assert not layer.dequantize(torch.float32).any()
    assert not layer(torch.ones(1, 128)).any()


def test_a_bias_is_added() -> None:
    bias = torch.arange(8.0)
    layer = QuantizedLinear.from_weight(torch.zeros(8, 64), "nf4", bias)
    assert torch.equal(layer(torch.ones(1, 64)), bias.unsqueeze(0))


def test_a_format_without_a_handler_is_refused() -> None:
    with pytest.raises(InputError, match="llm-int8 weights are not held here"):
        handler("llm-int8")
    with pytest.raises(InputError, match="unknown format 'nf5'"):
        handler("nf5")


@pytest.mark.parametrize("format_name", sorted(HANDLERS))
def test_operators_pass_torchs_own_checks(format_name: str) -> None:
    layer = QuantizedLinear.from_weight(weight_of((64, 128)), format_name)
    x = torch.ones(2, 128, dtype=torch.bfloat16)
    compiled = torch.export.export(layer, (x,)).module()
    assert torch.equal(compiled(x), layer(x))
