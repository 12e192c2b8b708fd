"""Why a choice was not taken, in words with numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from oomproof.formats import READ_FORMATS, DType, Format
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.kv_cache import KV_FORMATS
from oomproof.memory.profiles import EngineProfile
from oomproof.memory.terms import DeviceTerms
from oomproof.models.spec import ModelSpec, TensorSpec
from oomproof.planning.candidate import Candidate
from oomproof.planning.engines import why_not_native
from oomproof.planning.speed import host_link_bytes_per_s
from oomproof.units import format_bytes

BITSANDBYTES_ON_A_PROCESSOR = (
    "transformers runs it: on a processor bitsandbytes' kernels for 4 bits are faster than ours; "
    "--engine native asks for ours"
)
NOT_STREAMED = "layers in host memory are streamed by the native engine only"
"""Why a plan with --offload cpu is priced and not run."""
NOT_SEARCHED = "block scales are searched by the native engine only"
"""Why a plan with --search is not run."""


def why_not_runnable(
    spec: ModelSpec,
    weight_format: Format,
    kv_format: str,
    compute_dtype: DType,
    profiles: Sequence[EngineProfile],
    devices: Sequence[DeviceSpec],
) -> str | None:
    """Why the engine cannot run a model in a format on these devices; None where it can."""
    if any(layer.is_latent for layer in spec.attention):
        return "multi-head latent attention is planned and not run by this version"
    if profiles[0].engine == "native":
        refusal = why_not_native(spec, weight_format, devices)
        if refusal is not None:
            return refusal
    for profile, device in zip(profiles, devices, strict=True):
        held = _why_not_held(spec, weight_format, profile, device)
        refusal = held or _why_not_cached(kv_format, compute_dtype, profile)
        if refusal is not None:
            return refusal
    return None


def _why_not_held(
    spec: ModelSpec, weight_format: Format, profile: EngineProfile, device: DeviceSpec
) -> str | None:
    """Why an engine does not run weights in a format on a device."""
    if device.kind == "cpu" and profile.engine == "transformers" and weight_format.quant_type:
        narrow = _unpackable(spec, profile)
        if narrow is not None:
            return (
                f"{weight_format.name} is not run on a CPU: bitsandbytes' kernels there want "
                f"weights of 32 × 64, and {narrow.name} is "
                f"{narrow.shape[0]} × {narrow.shape[1]}"
            )
    needed = weight_format.min_compute_capability
    has = device.compute_capability
    if needed is not None and has is not None and has < needed:
        return (
            f"{weight_format.name} needs compute capability {needed[0]}.{needed[1]}, "
            f"{device.name} has {has[0]}.{has[1]}"
        )
    stored = spec.checkpoint_quantization
    reads = stored is not None and (
        stored.held_as is not None
        if profile.engine == "native"
        else stored.method == "bitsandbytes"
    )
    if stored is not None and not reads:
        why = f" ({stored.note})" if stored.held_as is None and stored.note else ""
        return (
            f"{stored.method} checkpoints are planned as they are, and not run by the "
            f"{profile.engine} engine here{why}; {stored.runs_with} runs them"
        )
    is_mixed = weight_format.by_tensor is not None
    if profile.engine == "native" and weight_format.name in READ_FORMATS:
        return None
    if not weight_format.members <= profile.formats or (is_mixed and profile.engine != "native"):
        return f"{weight_format.name} is not run by the {profile.engine} engine on {device.kind}"
    return None


def _why_not_cached(kv_format: str, compute_dtype: DType, profile: EngineProfile) -> str | None:
    """Why an engine does not keep a KV cache in a format."""
    if kv_format not in profile.kv_formats:
        return f"a {kv_format} KV cache is not kept by the {profile.engine} engine"
    if profile.kv_in_compute_dtype and KV_FORMATS[kv_format] is not compute_dtype:
        return (
            f"the {profile.engine} engine keeps its KV cache in the compute dtype, "
            f"{compute_dtype}, not in {kv_format}"
        )
    return None


def _unpackable(spec: ModelSpec, profile: EngineProfile) -> TensorSpec | None:
    """A weight that bitsandbytes' kernels for processors do not serve.

    Its packing (AVX-512 bf16) wants rows of 32 and columns of 64; without packing, a row that is
    no multiple of a block of 64 is dequantized to wrong values (bitsandbytes 0.50).
    """
    rows = 32 if profile.repacks_4bit else 1
    for tensor in spec.tensors:
        if tensor.role in profile.quantized_roles and (
            tensor.shape[0] % rows or tensor.shape[1] % 64
        ):
            return tensor
    return None


def misfit(
    terms: Mapping[int, DeviceTerms], usable: Mapping[int, int], names: Mapping[int, str]
) -> str:
    """What is missing, and on which device most: "12.3 GiB missing, 4.1 of it on GPU 1 (…)"."""
    missing = {index: max(0, terms[index].peak_bytes - usable[index]) for index in terms}
    total = sum(missing.values())
    worst = max(missing, key=lambda index: missing[index])
    where = names[worst]
    needs, has = format_bytes(terms[worst].peak_bytes), format_bytes(usable[worst])
    if len(missing) == 1:
        return f"{format_bytes(total)} missing on {where}: needs {needs}, has {has}"
    most = format_bytes(missing[worst])
    return f"{format_bytes(total)} missing over {len(missing)} devices, {most} of it on {where}"


def device_label(device: DeviceSpec) -> str:
    """How sentences name a device: "GPU 0 (NVIDIA H200)", or "the CPU's RAM"."""
    return "the CPU's RAM" if device.kind == "cpu" else f"GPU {device.index} ({device.name})"


def why_not(candidate: Candidate) -> str | None:
    """Why a choice was not taken; None where it fits and runs."""
    name = candidate.format.name
    if not candidate.fits:
        return f"{name} does not fit: {_what_is_missing(candidate)}"
    if candidate.not_runnable is not None:
        return f"{name} would fit, but {candidate.not_runnable}"
    return None


def _what_is_missing(candidate: Candidate) -> str:
    if candidate.device_shortfall_bytes == 0:
        host = candidate.host_plan
        needs, has = format_bytes(host.peak_bytes), format_bytes(host.usable_bytes or 0)
        missing = format_bytes(candidate.host_shortfall_bytes)
        return f"{missing} of host RAM missing: needs {needs}, {host.limit} allows {has}"
    used = [slot for slot in candidate.slots if slot.device.index in candidate.ranges]
    return misfit(
        {slot.device.index: candidate.terms(slot) for slot in used},
        {slot.device.index: slot.usable_bytes for slot in used},
        {slot.device.index: device_label(slot.device) for slot in used},
    )


def nearest(
    chosen: Candidate,
    others: Sequence[Candidate],
    max_context: int,
    max_concurrency: int,
    streamed: Candidate | None,
) -> list[str]:
    """Choices near one that does not fit, that do."""
    found = []
    if max_context:
        found.append(f"it would fit with --context {max_context}")
    if max_concurrency:
        found.append(f"it would fit with --concurrency {max_concurrency}")
    smaller = [other.format.name for other in others if other.fits and other.not_runnable is None]
    if smaller:
        found.append(f"--format {smaller[0]} would fit")
    if streamed is not None:
        found.append(
            f"--format {chosen.format.name} --offload cpu would fit, with "
            f"{format_bytes(streamed.streamed_bytes)} of the layers in host RAM, "
            f"at {streamed.decode_speed:.2g} tokens/s at best"
        )
    return found


def price_of_streaming(candidate: Candidate) -> str:
    """What keeping layers in host memory costs."""
    links = {
        slot.device.index: host_link_bytes_per_s(slot.device) / 1e9
        for slot in candidate.slots
        if slot.device.index in candidate.streamed
    }
    rates = " and ".join(f"{rate:.0f} GB/s" for rate in sorted(set(links.values())))
    return (
        f"{format_bytes(candidate.streamed_bytes)} of the layers stay in host RAM and travel at "
        f"{rates} for every token: {candidate.decode_speed:.2g} tokens/s at best"
    )


def held_otherwise(spec: ModelSpec, weight_format: Format) -> str | None:
    """How the native engine holds a checkpoint in another layout; None where it is the same."""
    own = spec.checkpoint_quantization
    if own is None or own.format is None or own.held_as is None or weight_format is own.format:
        return None
    return (
        f"its weights, {own.method} in {own.format.name}, are held code for code as "
        f"{weight_format.name}" + (f"; {own.note}" if own.note else "")
    )


def adapter(spec: ModelSpec, candidate: Candidate) -> list[str]:
    """What an adapter takes, and whether it is another model's; empty where there is none."""
    found = spec.adapter
    if found is None:
        return []
    size = candidate.slots[0].model.adapter_bytes()
    taken = (
        f"the adapter {found.name} (rank {found.rank}, {len(found.weights)} linear layers) is "
        f"beside the weights, unmerged, and {format_bytes(size)} of their bytes"
    )
    return [taken] if found.warning is None else [taken, found.warning]


def attention(spec: ModelSpec, engine: str) -> str:
    """Which attention is used, and why."""
    if engine == "native":
        return "attention is our own, over pages that are allocated at load"
    if spec.eager_attention:
        return "attention is eager: no fused kernel computes this model's"
    return "attention is torch's SDPA, which takes its fastest kernel that applies"
