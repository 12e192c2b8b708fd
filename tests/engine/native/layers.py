"""One decoder layer's parameters for tests, without a model around them."""

from __future__ import annotations

import torch

from oomproof.engine.native.layout import Block, Held, Placed
from oomproof.engine.native.weights import Parameter
from oomproof.formats import DType, get_format
from oomproof.memory.weights import stored
from oomproof.models.spec import Role, TensorSpec

Shape = tuple[int, int, int, int]
"""Rows of q, rows of k and v, hidden size, width of the MLP."""


def layer_tensors(
    shape: Shape,
    format_name: str,
    *,
    biased: bool = False,
    compute: DType = DType.FLOAT32,
    layer: int = 0,
) -> list[Held]:
    """As a model lists them."""
    queries, kv, hidden, width = shape
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    specs: list[tuple[str, tuple[int, ...], Role]] = []
    for linear, matrix in linears.items():
        specs.append((f"{linear}.weight", matrix, Role.LINEAR))
        if biased:
            specs.append((f"{linear}.bias", matrix[:1], Role.BIAS))
    norms = ("input_layernorm", "post_attention_layernorm")
    specs += [(f"{name}.weight", (hidden,), Role.NORM) for name in norms]
    found = []
    for name, size, role in specs:
        whole_name = f"model.layers.{layer}.{name}"
        spec = TensorSpec(name=whole_name, shape=size, role=role, layer=layer)
        linear_only = frozenset({Role.LINEAR})
        found.append((spec, stored(spec, get_format(format_name), compute, linear_only)))
    return found


def values_of(placed: Placed) -> torch.Tensor:
    """Repeatable values of a parameter, in its name's own order."""
    seed = sum(map(ord, placed.spec.name))
    generator = torch.Generator().manual_seed(seed)
    return (0.05 * torch.randn(placed.spec.shape, generator=generator)).bfloat16()


def workspace_of(block: Block, device: torch.device) -> torch.Tensor:
    """Filled with what must not be used."""
    numel = max(placed.workspace_numel for placed in block.placed)
    return torch.full((numel,), float("nan"), device=device)


def fill(block: Block, memory: torch.Tensor, home: torch.Tensor | None = None) -> None:
    """Brings every parameter to memory in slices, as the loader does, and on to host memory."""
    workspace = workspace_of(block, memory.device)
    for placed in block.placed:
        copy_to = None if home is None else Parameter(placed, home).parts
        target = Parameter(placed, memory).target(workspace, copy_to)
        values = values_of(placed).to(memory.device)
        if not placed.held.quantized:
            values = values.to(getattr(torch, placed.held.dtype))
        step = 2 * target.rows_multiple
        for first in range(0, len(values), step):
            target.store(values[first : first + step], first)
        if target.finish is not None:
            target.finish()
