"""What files hold for one quantized weight, of the layouts that the native engine reads.

bitsandbytes        4 bits: codes, their statistics, and JSON that says how to read them; 8 bits
                    (LLM.int8(), arXiv:2208.07339): a row is codes × SCB / 127
fbgemm_fp8,         a scale a row, or one a tensor; what is said of activations is of no use here
compressed-tensors
fp8, "block"        a scale for each 128 × 128
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from oomproof.formats import FP8_BLOCK, DType, Format, ceil_div

SCALE_DTYPES = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)
"""Of stored scales: all of them are float32 numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPart:
    """A tensor that a checkpoint holds for one weight."""

    component: str
    """What it is, in the words of formats.py, or:

    quant_state     JSON that says how to read the others
    SCB             largest magnitudes of rows, 127 times the scale
    tensor_scale    the scale of every row
    weight_format   0, where rows of int8 codes lie one after the other
    input_scale     of activations: looked at, and not used
    """
    name: str
    """Its name in the file."""
    dtype: DType
    shape: tuple[int, ...] | None
    """None for quant_state, whose length varies."""
    dtypes: tuple[DType, ...] = ()
    """Others that it may have."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Others that it may have."""
    required: bool = True

    def accepts(self, dtype: DType, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that type and shape can be it."""
        return dtype in (self.dtype, *self.dtypes) and shape in (self.shape, *self.shapes)


PartsOf = Callable[[str, tuple[int, ...]], tuple[StoredPart, ...]]
"""Name and shape of a weight → its parts."""


def bitsandbytes_parts(
    name: str, shape: tuple[int, ...], weight_format: Format
) -> tuple[StoredPart, ...]:
    """What bitsandbytes 4-bit checkpoints hold for the weight `name`.

    As transformers 5 with bitsandbytes 0.50 writes them: the codes are a column, and the offset of
    double quantization is a number in quant_state.
    """
    rows, columns = shape
    found = [
        StoredPart(
            component=part.name,
            name=name if part.name == "weight" else f"{name}.{part.name}",
            dtype=part.dtype,
            shape=(part.numel, 1) if part.name == "weight" else (part.numel,),
        )
        for part in weight_format.components(rows, columns)
        if part.name != "nested_offset"
    ]
    state = f"{name}.quant_state.bitsandbytes__{weight_format.quant_type}"
    return (
        *found,
        StoredPart(component="quant_state", name=state, dtype=DType.UINT8, shape=None),
    )


def llm_int8_parts(name: str, shape: tuple[int, ...]) -> tuple[StoredPart, ...]:
    """What bitsandbytes 8-bit checkpoints hold for the weight `name`."""
    module = name.removesuffix(".weight")
    return (
        StoredPart(component="weight", name=name, dtype=DType.INT8, shape=shape),
        StoredPart(component="SCB", name=f"{module}.SCB", dtype=DType.FLOAT32, shape=shape[:1]),
        StoredPart(
            component="weight_format",
            name=f"{module}.weight_format",
            dtype=DType.UINT8,
            shape=(),
            shapes=((1,),),
            required=False,
        ),
    )


def row_parts(name: str, shape: tuple[int, ...], codes: DType) -> tuple[StoredPart, ...]:
    """Codes with a scale a row: FBGEMM's, and compressed-tensors' `channel`."""
    return _with_scale(name, shape, codes, "scale", (shape[0], 1), shape[:1])


def tensor_parts(name: str, shape: tuple[int, ...], codes: DType) -> tuple[StoredPart, ...]:
    """Codes with one scale: compressed-tensors' `tensor`."""
    return _with_scale(name, shape, codes, "tensor_scale", (1,), (), (1, 1))


def block_parts(name: str, shape: tuple[int, ...], scale: str) -> tuple[StoredPart, ...]:
    """e4m3 with a scale for each square of 128 × 128, which ends where the weight does.

    Args:
        name: Of the weight.
        shape: Of the weight.
        scale: What the scales are called in the file.
    """
    squares = tuple(ceil_div(size, FP8_BLOCK) for size in shape)
    codes = DType.FLOAT8_E4M3FN
    return _with_scale(name, shape, codes, "block_scale", squares, scale_name=scale)


def _with_scale(
    name: str,
    shape: tuple[int, ...],
    codes: DType,
    component: str,
    *scale_shapes: tuple[int, ...],
    scale_name: str = "weight_scale",
) -> tuple[StoredPart, ...]:
    module = name.removesuffix(".weight")
    first, *others = scale_shapes
    own, *rest = SCALE_DTYPES
    inputs = [
        StoredPart(
            component="input_scale",
            name=f"{module}.{part}",
            dtype=own,
            shape=(1,),
            dtypes=tuple(rest),
            shapes=((),),
            required=False,
        )
        for part in ("input_scale", "input_scale_ub")
    ]
    return (
        StoredPart(component="weight", name=name, dtype=codes, shape=shape),
        StoredPart(
            component=component,
            name=f"{module}.{scale_name}",
            dtype=own,
            shape=first,
            dtypes=tuple(rest),
            shapes=tuple(others),
        ),
        *inputs,
    )
