"""What each parameter becomes on its device: which tensors, which dtype, how many bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from oomproof.formats import Component, DType, Format
from oomproof.memory.profiles import EngineProfile
from oomproof.models.spec import Role, TensorSpec
from oomproof.units import round_up


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One parameter as the engine holds it."""

    name: str
    quantized: bool
    components: tuple[Component, ...]
    """The tensors that hold it; the first is the parameter itself."""
    format: str | None = None
    """The format that they are of; None where it is not quantized, or the checkpoint's own."""

    @property
    def dtype(self) -> DType:
        """Element type of the parameter (of the codes, where it is quantized)."""
        return self.components[0].dtype

    @property
    def stored_bytes(self) -> int:
        """Exact bytes, without alignment."""
        return sum(part.size_bytes for part in self.components)

    def allocated_bytes(self, alignment: int) -> int:
        """Bytes an allocator that hands out multiples of `alignment` takes."""
        return sum(round_up(part.size_bytes, alignment) for part in self.components)


def stored(
    tensor: TensorSpec, weight_format: Format, compute_dtype: DType, quantized: frozenset[Role]
) -> StoredTensor:
    """How an engine that quantizes these roles holds a parameter.

    What it does not quantize stays in the compute dtype. A checkpoint that is quantized already
    says itself what stays, and, where its headers were read, what each parameter takes in its own
    layout.
    """
    is_quantized = False
    weight_format = weight_format.for_tensor(tensor.name)
    components: tuple[Component, ...] = (
        Component(name="weight", dtype=compute_dtype, numel=tensor.numel),
    )
    if weight_format.foreign and tensor.stored_as is not None:
        is_quantized, components = True, tensor.stored_as
    elif weight_format.is_quantized and not tensor.kept:
        if tensor.role in quantized and len(tensor.shape) == 2:
            is_quantized, components = True, weight_format.components(*tensor.shape)
        elif tensor.role is Role.EXPERTS and weight_format.quantizes_experts:
            experts, *matrix = tensor.shape
            is_quantized = True
            components = tuple(
                replace(part, numel=experts * part.numel)
                for part in weight_format.components(*matrix)
            )
    known = is_quantized and not weight_format.foreign
    return StoredTensor(
        name=tensor.name,
        quantized=is_quantized,
        components=components,
        format=weight_format.name if known else None,
    )


def resident_bytes(tensor: TensorSpec, held: StoredTensor, profile: EngineProfile) -> int:
    """Bytes of a parameter once the engine has run: as loaded, or as repacked where that is more.

    bitsandbytes rewrites 4-bit weights at the first forward on a CPU with AVX-512 bf16: nested
    scales vanish and every absmax becomes a bfloat16 (bitsandbytes 0.50, functional.py).
    """
    loaded = held.allocated_bytes(profile.alignment_bytes)
    if not (held.quantized and profile.repacks_4bit and held.dtype is DType.UINT8):
        return loaded
    codes, *_ = held.components
    repacked = codes.size_bytes + tensor.numel // 64 * DType.BFLOAT16.itemsize
    kept = sum(part.size_bytes for part in held.components if part.name == "quant_map")
    return max(loaded, repacked + kept)
