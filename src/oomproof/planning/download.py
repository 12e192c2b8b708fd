"""What has to be fetched, and what the disk has room for."""

from __future__ import annotations

from oomproof.hardware.spec import Hardware
from oomproof.memory.weights import stored
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.plan import DiskPlan


def disk_of(spec: ModelSpec, hardware: Hardware) -> DiskPlan:
    """What the download needs on the disk that keeps it."""
    described = hardware.source == "described"
    return DiskPlan(
        free_bytes=None if described else hardware.host.free_disk_bytes,
        needed_bytes=max(0, download_bytes(spec) - spec.cached_bytes),
    )


def download_bytes(spec: ModelSpec) -> int:
    """Bytes to fetch: nothing for a folder, the files for a hub id, an estimate for the catalog."""
    if spec.source.kind == "folder":
        return 0
    if spec.download_bytes is not None:
        return spec.download_bytes
    if spec.checkpoint is not None:
        return spec.checkpoint.total_bytes
    quantization = spec.checkpoint_quantization
    if quantization is None or quantization.format is None:
        return spec.num_parameters * spec.dtype.itemsize
    roles = frozenset({Role.LINEAR})
    return sum(
        stored(tensor, quantization.format, spec.dtype, roles).stored_bytes
        for tensor in spec.tensors
    )
