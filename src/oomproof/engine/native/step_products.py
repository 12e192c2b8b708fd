"""The products of a decode step, without the model around them: what tuning times."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oomproof.engine.native.layout import GATE_UP, QKV, Block, Held, lay_out_block, name_in_layer
from oomproof.engine.native.weights import Parameter, tiled_set
from oomproof.errors import NotRunnableError
from oomproof.formats import DType
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.memory.weights import stored
from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import Plan
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tiled_writer import SCALES
from oomproof.quantization.tiles import TILE_ROWS
from oomproof.quantization.tuned import ProductKey

_PRODUCTS = {
    "qkv": QKV,
    "o": ("self_attn.o_proj",),
    "gate_up": GATE_UP,
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProduct:
    """A product of a decode step, as it lies in memory."""

    name: str
    block: Block
    """Its linears alone: one stream of tiles."""

    @property
    def has_norm(self) -> bool:
        """Whether a layer normalises its input."""
        return self.name in {"qkv", "gate_up"}

    @property
    def is_gated(self) -> bool:
        """Whether SwiGLU's gate follows it."""
        return self.name == "gate_up"

    @property
    def scales(self) -> DType:
        """Type of stored scales."""
        components = self.block.placed[0].held.components
        return next(part.dtype for part in components if part.name in SCALES)

    def key(self, template: int, processors: int, *, normed: bool) -> ProductKey:
        """Its name in the table of launches."""
        first = self.block.placed[0]
        assert first.tiling is not None
        return ProductKey(
            processors=processors,
            scales=str(self.scales),
            normed=normed,
            template=template,
            columns=first.matrix_shape[1],
            tiles=first.tiling.tiles,
            unit=first.tiling.tile_stride,
        )


def products_of(plan: Plan, spec: ModelSpec) -> list[StepProduct]:
    """The different products of a model's layers, as tiles on a GPU.

    Raises:
        NotRunnableError: Its decode steps do not use the kernel.
    """
    weight_format, compute = plan.weight_format, DType(plan.compute_dtype)
    roles = QUANTIZED_ROLES[plan.engine]
    layers: dict[int, dict[str, Held]] = {}
    for tensor in spec.tensors:
        if tensor.layer is not None:
            held = stored(tensor, weight_format, compute, roles)
            layers.setdefault(tensor.layer, {})[name_in_layer(tensor)] = (tensor, held)
    found: dict[tuple[object, ...], StepProduct] = {}
    for layer in layers.values():
        products = _products_of_layer(layer, plan.format)
        if len(products) < len(_PRODUCTS):
            raise NotRunnableError(
                f"decode steps of {plan.model} in {plan.format} do not use the kernel that is "
                "tuned: rows must be multiples of 16 and columns of 128",
                remedy="there is nothing to tune for it",
            )
        for product in products:
            shapes = tuple(placed.spec.shape for placed in product.block.placed)
            found.setdefault((product.name, *shapes), product)
    return sorted(found.values(), key=lambda product: list(_PRODUCTS).index(product.name))


def _products_of_layer(layer: dict[str, Held], format_name: str) -> list[StepProduct]:
    """Those that are one stream of tiles each."""
    found = []
    for name, linears in _PRODUCTS.items():
        weights = [layer[f"{linear}.weight"] for linear in linears if f"{linear}.weight" in layer]
        if len(weights) < len(linears):
            continue
        block = lay_out_block(weights, format_name, tiled=True)
        tiling = block.placed[0].tiling
        rows = sum(placed.matrix_shape[0] for placed in block.placed)
        biases = sum(f"{linear}.bias" in layer for linear in linears)
        if tiling is not None and tiling.tiles * TILE_ROWS == rows and biases in {0, len(linears)}:
            found.append(StepProduct(name=name, block=block))
    return found


def random_set(block: Block, device: torch.device) -> TiledSet:
    """The linears of a product, with made-up codes and small scales."""
    memory = torch.empty(block.size_bytes, dtype=torch.uint8, device=device).random_()
    parameters = [Parameter(placed, memory) for placed in block.placed]
    for parameter in parameters:
        for part in parameter.parts.values():
            if part.is_floating_point():
                part.uniform_(0.005, 0.01)
    return tiled_set(parameters)
