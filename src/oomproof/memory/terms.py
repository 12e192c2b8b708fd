"""The terms of one device's memory, and the one equation that adds them up."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTerms:
    """Predicted bytes of one device, each a term of docs/4-memory-model.md."""

    cuda_context: int = 0
    """CUDA context and loaded modules, outside torch's allocator."""
    weights: int = 0
    """Stored parameters: codes, scales, codebooks, alignment."""
    kv_cache: int = 0
    """Keys and values of every planned token."""
    workspace: int = 0
    """The largest of a prefill chunk, a decode step, the logits, dequantization scratch."""
    staging: int = 0
    """Source tensors on their way, while loading."""
    graphs: int = 0
    """CUDA-graph pools."""
    comm: int = 0
    """Communication buffers between devices."""
    margin: int = 0
    """What no term explains; stated, not hidden in a percentage."""

    @property
    def peak_bytes(self) -> int:
        """The most this device ever holds: loading and running do not overlap."""
        running = self.kv_cache + self.workspace + self.graphs + self.comm
        return self.cuda_context + self.weights + max(self.staging, running) + self.margin

    def as_dict(self) -> dict[str, int]:
        """Term name → bytes, in the order of the table."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTerms:
    """Predicted bytes of host RAM."""

    runtime: int = 0
    """The process itself: Python, torch, CUDA's libraries."""
    staging: int = 0
    """Source tensors on their way, while loading."""
    pinned: int = 0
    """Page-locked buffers for copies to a GPU, and what page-locking offloaded layers rounds up."""
    offloaded: int = 0
    """Layers that stay here, page-locked, and are streamed to their device in every step."""
    margin: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most the process holds in host RAM, besides a model on the device `cpu`."""
        return self.runtime + self.staging + self.pinned + self.offloaded + self.margin

    def as_dict(self) -> dict[str, int]:
        """Term name → bytes."""
        return asdict(self)
