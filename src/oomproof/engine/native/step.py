"""Attention of a decode step in one launch, where there is a kernel for the heads and the GPU.

Everything that depends on the plan alone is made once; a layer's launch is its parameters.
"""

from __future__ import annotations

import torch

from oomproof.engine.native.arena import Arena
from oomproof.engine.native.attend_cuda import (
    AttendedLayer,
    Geometry,
    geometry_of,
    launch_attend,
    load_attend,
    params_of,
    supports,
    variant_of,
)
from oomproof.engine.native.kv_pool import KVPool
from oomproof.formats import DType
from oomproof.models.forward import ForwardSpec


class StepAttention:
    """Rotates, stores and attends, a row a request.

    Args:
        arena: The device's buffers.
        pool: Its keys and values.
        forward: The model's numbers.
        group: Query heads of a KV head.

    Raises:
        CudaError: The driver refuses the kernel.
        MissingDependencyError: NVRTC, or Python's way to it, is not installed.
    """

    def __init__(self, arena: Arena, pool: KVPool, forward: ForwardSpec, group: int) -> None:
        self._arena, self._pool, self._forward = arena, pool, forward
        keys, _ = pool.layer(pool.first)
        qkv = arena["qkv"]
        self._device = qkv.device
        self._kv_heads = keys.shape[1]
        self._capability = torch.cuda.get_device_capability(self._device)
        self._variant = variant_of(_named(qkv), _named(keys), keys.shape[3], group)
        with torch.cuda.device(self._device):
            self._kernel = load_attend(self._variant, self._capability)
        self._geometries: dict[tuple[int, int], Geometry] = {}

    def run(
        self, index: int, rows: int, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None
    ) -> None:
        """A layer: from the arena's qkv to its attended values, and the pool.

        Args:
            index: The layer.
            rows: Of the step.
            q_norm: [head dim] of an RMSNorm of each query head, or None.
            k_norm: The same for keys.
        """
        arena, pool = self._arena, self._pool
        keys, values = pool.layer(index)
        window = pool.window(index)
        _, positions, slots = arena["inputs"]
        layer = AttendedLayer(
            keys=keys,
            values=values,
            rotary=arena["rotary"],
            positions=positions,
            slots=slots,
            pages=pool.tables[window],
            q_norm=q_norm,
            k_norm=k_norm,
            partials=arena["step_partials"],
            counters=arena["counters"],
            scale=self._forward.attention_scale,
            window=window,
            eps=self._forward.rms_norm_eps,
        )
        geometry = self._geometry(rows, window)
        params = params_of(geometry, layer, arena["qkv"][:rows], arena["attended"][:rows])
        with torch.cuda.device(self._device):
            launch_attend(self._kernel, geometry, params)

    def _geometry(self, rows: int, window: int) -> Geometry:
        found = self._geometries.get((rows, window))
        if found is None:
            properties = torch.cuda.get_device_properties(self._device)
            context = self._arena["rotary"].shape[1]
            found = geometry_of(
                self._variant,
                rows=rows,
                kv_heads=self._kv_heads,
                context=min(context, window) if window else context,
                multiprocessors=properties.multi_processor_count,
                multiprocessor_shared_bytes=properties.shared_memory_per_multiprocessor,
                capability=self._capability,
            )
            self._geometries[rows, window] = found
        return found


def step_attention(arena: Arena, pool: KVPool, forward: ForwardSpec) -> StepAttention | None:
    """The fused attention of a device's decode steps; None where operators compute it."""
    qkv, attended = arena["qkv"], arena["attended"]
    keys, _ = pool.layer(pool.first)
    head_dim = keys.shape[3]
    group = attended.shape[1] // head_dim // keys.shape[1]
    if not qkv.is_cuda or not supports(
        _named(qkv), _named(keys), head_dim, group, torch.cuda.get_device_capability(qkv.device)
    ):
        return None
    return StepAttention(arena, pool, forward, group)


def _named(tensor: torch.Tensor) -> DType:
    return DType(str(tensor.dtype).removeprefix("torch."))
