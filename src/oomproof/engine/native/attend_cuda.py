"""Decode attention in CUDA C++: how cuda/attend.cu is compiled, sized and launched.

One launch does what rotate_and_store and attend do for a decode step (operators.py), in bf16 or
fp16, with keys and values in the same type or in e4m3. A kernel is loaded for a variant (load),
a launch's sizes follow from its rows (geometry_of), and nothing but the launch is left to a step.
The sizes need no torch: the plan counts them before there is a GPU.

A grid is [clusters × blocks of a cluster, kv heads, 1]. How many clusters a row gets is decided on
the device from all rows' positions, so that a recorded graph serves every length.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from oomproof.formats import DType, ceil_div
from oomproof.kernels.source import Source, Variant
from oomproof.memory.native import ATTENTION_BLOCKS
from oomproof.units import KIB

if TYPE_CHECKING:
    import torch

    from oomproof.kernels.module import Kernel

HEAD_DIMS = (64, 96, 128, 256)
MOST_GROUP = 16
"""Query heads of a kv head."""
CLUSTER_SIZES = (8, 4, 2, 1)
LEAST_CAPABILITY = (8, 0)
CLUSTER_CAPABILITY = (9, 0)
BLOCK_TOKENS = 128
"""A row's second block of a cluster comes with more than so many tokens."""
CLUSTER_TOKENS_PER_BLOCK = 256
"""A row's second cluster comes with about so many tokens for each block of the first: to meet in
global memory costs more than to meet in a cluster."""
_MOST_SHARED_BYTES = 99 * KIB
_BLOCK_RESERVED_BYTES = KIB
"""Shared memory that CUDA keeps of each block."""
_MOST_STAGES = 6
_TILE_TOKENS = 16
_LOG2_E = 1.4426950408889634


class Params(ctypes.Structure):
    """As `struct Params` in attend.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "qkv", "keys", "values", "rotary", "positions", "slots", "pages",
                "q_norm", "k_norm", "out", "partials", "counters",
            )
        ),
        *((name, ctypes.c_int64) for name in ("qkv_stride", "out_stride", "rotary_stride")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "rows", "kv_heads", "group", "num_pages", "window",
                "block_tokens", "cluster_tokens", "clusters",
            )
        ),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The sizes of a launch."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    cluster: int
    """Blocks of a cluster, in x."""
    clusters: int
    """Clusters for a kv head that run side by side."""
    block_tokens: int
    cluster_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttendedLayer:
    """What a layer's launches have in common."""

    keys: torch.Tensor
    """[pages, kv heads, PAGE_TOKENS, head dim]."""
    values: torch.Tensor
    """Likewise."""
    rotary: torch.Tensor
    """Cosines and sines, float32 [2, positions, head dim / 2]."""
    positions: torch.Tensor
    """int32 [rows], or more of them."""
    slots: torch.Tensor
    """int32 [rows], or more of them; a row of -1 is padding, and comes out as zeros."""
    pages: torch.Tensor
    """int32 [slots, n]."""
    q_norm: torch.Tensor | None
    """[head dim]: of the norm of queries, where there is one."""
    k_norm: torch.Tensor | None
    """[head dim]: of the norm of keys, where there is one."""
    partials: torch.Tensor
    """float32 [memory.native.attention_partials]."""
    counters: torch.Tensor
    """int32 [memory.native.attention_counters], 0 at the beginning."""
    scale: float
    """Of the scores."""
    window: int
    """Tokens that a row looks back at, itself included; 0 for all."""
    eps: float
    """Of the norms."""


def supports(
    dtype: DType, kv_dtype: DType, head_dim: int, group: int, capability: tuple[int, int]
) -> bool:
    """Whether there is a variant for such heads on such a GPU; else Triton's kernels serve."""
    return (
        capability >= LEAST_CAPABILITY
        and dtype in {DType.BFLOAT16, DType.FLOAT16}
        and kv_dtype in {dtype, DType.FLOAT8_E4M3FN}
        and head_dim in HEAD_DIMS
        and 1 <= group <= MOST_GROUP
    )


@cache
def variant_of(dtype: DType, kv_dtype: DType, head_dim: int, group: int) -> Variant:
    """How the source is compiled for heads that it supports."""
    e4m3 = kv_dtype is DType.FLOAT8_E4M3FN
    head_tiles = ceil_div(group, 8)
    # A warp keeps a float32 sum for each head and element: more of them, fewer warps.
    warps = 8 if head_dim * head_tiles <= 128 else 4
    row_bytes = head_dim * (1 if e4m3 else 2)
    tile_bytes = _TILE_TOKENS * row_bytes
    heads = head_tiles * 8
    # Queries, the new key and value, softmax of each head, a flag: as attend.cu lays them out.
    fixed = heads * head_dim * 2 + 2 * row_bytes + heads * 8 + 16
    stages = min(_MOST_STAGES, (_MOST_SHARED_BYTES - fixed) // (warps * tile_bytes))
    # What a warp leaves at its end: a padded head's sums and its softmax.
    sums_bytes = ceil_div(heads * (head_dim + 6) * 4, 128) * 128
    return Variant(
        defines={
            "INPUT_BF16": int(dtype is DType.BFLOAT16),
            "KV_E4M3": int(e4m3),
            "HEAD_DIM": head_dim,
            "HEAD_TILES": head_tiles,
            "WARPS": warps,
            "STAGES": stages,
        },
        shared_bytes=warps * max(stages * tile_bytes, sums_bytes) + fixed,
    )


ATTEND = Source(
    path="engine/native/cuda/attend.cu",
    headers=("kernels/cuda/primitives.cuh",),
    variants=tuple(
        variant_of(dtype, kv_dtype, head_dim, group)
        for dtype in (DType.BFLOAT16, DType.FLOAT16)
        for kv_dtype in (dtype, DType.FLOAT8_E4M3FN)
        for head_dim in HEAD_DIMS
        for group in (8, 16)
    ),
    parameters=(Params,),
)


def geometry_of(
    variant: Variant,
    *,
    rows: int,
    kv_heads: int,
    context: int,
    multiprocessors: int,
    multiprocessor_shared_bytes: int,
    capability: tuple[int, int],
    cluster: int | None = None,
) -> Geometry:
    """The sizes of a launch for `rows` requests of up to `context` tokens.

    Args:
        variant: What is launched.
        rows: Of the decode step.
        kv_heads: Of the layer.
        context: Planned tokens of a request, or its window.
        multiprocessors: Of the GPU.
        multiprocessor_shared_bytes: Shared memory of each.
        capability: Compute capability.
        cluster: Blocks of a cluster; None for the largest for which there is room.
    """
    together = multiprocessor_shared_bytes // (variant.shared_bytes + _BLOCK_RESERVED_BYTES)
    # The kernel is compiled for two blocks on a multiprocessor; its registers allow no more.
    blocks = min(ATTENTION_BLOCKS, multiprocessors * max(1, min(2, together))) // kv_heads
    if cluster is None:
        cluster = _cluster_size(blocks // rows, context, capability)
    cluster_tokens = cluster * CLUSTER_TOKENS_PER_BLOCK
    most = ceil_div(context, cluster_tokens)
    each = max(1, min(most, blocks // cluster // rows))
    # Rows that are longer than others get more, up to one more for each row in all.
    spare = rows if rows > 1 and most > 1 else 0
    return Geometry(
        grid=((each * rows + spare) * cluster, kv_heads, 1),
        block=(int(variant.defines["WARPS"]) * 32, 1, 1),
        shared_bytes=variant.shared_bytes,
        cluster=cluster,
        clusters=each * rows,
        block_tokens=BLOCK_TOKENS,
        cluster_tokens=cluster_tokens,
    )


def load_attend(variant: Variant, capability: tuple[int, int]) -> Kernel:
    """The kernel of a variant, compiled or read, ready on the current device.

    Raises:
        CudaError: The driver refuses the machine code.
        KernelCompileError: NVRTC refuses the source.
        MissingDependencyError: NVRTC, or Python's way to it, is not installed.
        NotRunnableError: NVRTC knows no architecture that such a GPU runs.
    """
    from oomproof.kernels.module import load_modules

    [module] = load_modules(ATTEND, [variant], capability)
    kernel = module.kernel("attend", Params)
    kernel.prepare(variant.shared_bytes)
    return kernel


def params_of(
    geometry: Geometry, layer: AttendedLayer, qkv: torch.Tensor, out: torch.Tensor
) -> Params:
    """A launch's parameters: tensors that stay where they are while it may run.

    Args:
        geometry: For as many rows as `qkv` has.
        layer: Whose keys and values are looked at.
        qkv: [rows, (heads + 2 kv heads) × head dim]; it is only read.
        out: [rows, heads × head dim].
    """
    kv_heads, head_dim = layer.keys.shape[1], layer.keys.shape[3]
    return Params(
        qkv=qkv.data_ptr(),
        keys=layer.keys.data_ptr(),
        values=layer.values.data_ptr(),
        rotary=layer.rotary.data_ptr(),
        positions=layer.positions.data_ptr(),
        slots=layer.slots.data_ptr(),
        pages=layer.pages.data_ptr(),
        q_norm=None if layer.q_norm is None else layer.q_norm.data_ptr(),
        k_norm=None if layer.k_norm is None else layer.k_norm.data_ptr(),
        out=out.data_ptr(),
        partials=layer.partials.data_ptr(),
        counters=layer.counters.data_ptr(),
        qkv_stride=qkv.stride(0),
        out_stride=out.stride(0),
        rotary_stride=layer.rotary.stride(0),
        rows=qkv.shape[0],
        kv_heads=kv_heads,
        group=out.shape[1] // head_dim // kv_heads,
        num_pages=layer.pages.shape[1],
        window=layer.window,
        block_tokens=geometry.block_tokens,
        cluster_tokens=geometry.cluster_tokens,
        clusters=geometry.clusters,
        scale=layer.scale * _LOG2_E,
        eps=layer.eps,
    )


def launch_attend(kernel: Kernel, geometry: Geometry, params: Params) -> None:
    """Rotates, stores and attends, on the current stream; may be captured in a graph.

    It may start before the kernel in front of it has ended, and reads positions, slots, pages and
    earlier tokens' keys and values before it waits for that: they are complete when the first
    kernel of the step begins, which is launched without `dependent` (attend.cu says more).

    Args:
        kernel: Of load_attend, of the heads' variant.
        geometry: Of that variant.
        params: Of that geometry.

    Raises:
        CudaError: The driver refuses the launch, or an earlier kernel has failed.
    """
    import torch

    from oomproof.kernels.module import launch

    launch(
        kernel,
        geometry.grid,
        geometry.block,
        geometry.shared_bytes,
        params,
        torch.cuda.current_stream().cuda_stream,
        dependent=True,
        cluster=geometry.cluster,
    )


def _cluster_size(blocks: int, context: int, capability: tuple[int, int]) -> int:
    """The largest cluster for which a row has the blocks and the tokens.

    Larger ones than two only where one cluster has all of a row: several of them do not find eight
    free multiprocessors side by side at once (benchmarks/LOG.md). Many rows fill the GPU without.
    """
    if capability < CLUSTER_CAPABILITY:
        return 1
    useful = max(1, min(blocks, ceil_div(context, BLOCK_TOKENS)))
    largest = CLUSTER_SIZES[0]
    if blocks < largest:
        return 1
    if context > largest * CLUSTER_TOKENS_PER_BLOCK:
        useful = min(useful, 2)
    return next(size for size in CLUSTER_SIZES if size <= useful)
