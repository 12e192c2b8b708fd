"""Every launch of a kernel, compiled for every GPU that we support, without one.

Triton's interpreter takes what its compiler refuses, and knows no shared memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oomproof.formats import ceil_div
from oomproof.quantization import operators
from oomproof.quantization.handlers import HANDLERS, handler
from tests.quantization.weights import encode_in_slices, random_input, random_weight, tiled_set

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_kernels.py runs them there"),
]
CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED_MEMORY_BYTES = 99 * 1024
POINTERS = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
Launch = tuple[Any, tuple[tuple[str, str], ...], tuple[tuple[str, Any], ...], tuple[str, ...], int]


def launch_of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """(kernel, types, constants, names of multiples of 16, warps and stages) of one launch."""
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    constants, types, aligned = {}, {}, []
    for parameter in kernel.params:
        value = named[parameter.name]
        free = not parameter.is_constexpr and not parameter.do_not_specialize
        if parameter.is_constexpr or (free and isinstance(value, int) and value == 1):
            constants[parameter.name] = value
            types[parameter.name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = POINTERS[value.dtype]
            aligned.append(parameter.name)
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if free and isinstance(value, int) and value % 16 == 0:
                aligned.append(parameter.name)
    warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)
    return (
        kernel,
        tuple(types.items()),
        tuple(constants.items()),
        tuple(aligned),
        warps * 100 + stages,
    )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[Launch]:
    """The launches that happen while the operators stand for the kernels and run nothing."""
    from triton.runtime.jit import JITFunction

    from oomproof.quantization import products_cuda, quantize_triton

    found: set[Launch] = set()

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.add(launch_of(kernel, arguments, options))

    monkeypatch.setattr(JITFunction, "run", run)
    for module in (products_cuda, quantize_triton):
        for name in vars(operators).keys() & vars(module).keys():
            if name.startswith(("gated_", "linear_", "quantize_")):
                monkeypatch.setattr(operators, name, getattr(module, name))
    return found


def launch_all(dtype: torch.dtype) -> None:
    """Every format, in shapes for each kernel."""
    scratch = torch.empty(1 << 22, dtype=torch.uint8)
    for name in HANDLERS.keys() - {"fp32", "bf16", "fp16"}:
        for shape in ((128, 4096), (65, 63)):
            encode_in_slices(name, random_weight(shape, dtype), shape[0], search=True)
            parts = encode_in_slices(name, random_weight(shape, dtype), shape[0])
            for tokens in (1, 8, 32, 64, 65):
                x = random_input(tokens, shape[1], dtype)
                out = torch.empty(tokens, shape[0], dtype=dtype)
                handler(name).multiply(x, parts, shape, out, scratch)


def launch_tiled(dtype: torch.dtype) -> None:
    """Every kind of scale, and the copies."""
    from oomproof.quantization.tiles_triton import copy_tiles

    scratch = torch.empty(1 << 22, dtype=torch.uint8)
    for name in ("nf4", "nf4-dq", "int4"):
        for columns in (1024, 1152):
            parts = handler(name).encode(random_weight((64, columns), dtype))
            weights = tiled_set(name, [parts, parts], columns, in_turn=True)
            x, out = random_input(65, columns, dtype), torch.empty(65, 128, dtype=dtype)
            operators.linear_4bit_tiled(x, *weights.arguments(), out, scratch)
            gated = torch.empty(65, 64, dtype=dtype)
            operators.gated_4bit_tiled(x, *weights.arguments(), [], gated, scratch)
            copy_tiles(weights.codes[::2], weights.codes[1::2])


def launch_blocks(dtype: torch.dtype) -> None:
    """What only checkpoints come in."""
    scratch = torch.empty(1 << 22, dtype=torch.uint8)
    for rows, columns in ((128, 4096), (65, 63)):
        shape = ceil_div(rows, 128), ceil_div(columns, 128)
        parts = {
            "weight": torch.zeros(rows, columns, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "block_scale": torch.ones(shape),
        }
        for tokens in (1, 8, 32, 64, 65):
            x = random_input(tokens, columns, dtype)
            out = torch.empty(tokens, rows, dtype=dtype)
            handler("fp8-block").multiply(x, parts, (rows, columns), out, scratch)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_and_fits(capability: int, launches: set[Launch]) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        launch_all(dtype)
        launch_tiled(dtype)
        launch_blocks(dtype)
    assert len(launches) > 50
    for kernel, types, constants, aligned, warps_and_stages in launches:
        place = kernel.arg_names.index
        source = ASTSource(
            kernel,
            dict(types),
            {(place(name),): value for name, value in constants},
            {(place(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        options = {"num_warps": warps_and_stages // 100, "num_stages": warps_and_stages % 100}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options)
        assert compiled.metadata.shared <= SHARED_MEMORY_BYTES, (kernel, constants)
