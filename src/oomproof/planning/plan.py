"""The plan: a contract that scripts read as JSON and the loader executes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from oomproof.errors import InputError
from oomproof.formats import FIT, FORMATS, DType, Format, held_format, is_known_format, mixture
from oomproof.hardware.spec import DeviceKind
from oomproof.memory.kv_cache import KV_FORMATS
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.memory.terms import DeviceTerms, HostTerms
from oomproof.models.spec import ModelSource
from oomproof.planning.speed import TokensPerSecond

SCHEMA = 1
"""Version of the plan's JSON; it changes when a field's meaning does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePlan:
    """What one device will hold."""

    index: int
    name: str
    kind: DeviceKind
    uuid: str | None
    usable_bytes: int
    """Free before our own context, less --reserve, at most --max-memory and --cap."""
    limit_bytes: int | None = None
    """--cap or --max-memory, the smaller one: enforced while running; None for no limit."""
    layers: tuple[int, int] | None
    """First and last decoder layer, both included; None where it holds none."""
    streamed_layers: tuple[int, int] | None = None
    """Those of them that stay in host memory and travel in every step; None for none."""
    holds_embedding: bool
    holds_norm: bool
    """Whether the final norm is here; the head is too, unless it is tied to the embedding."""
    holds_head: bool
    terms: DeviceTerms

    @property
    def peak_bytes(self) -> int:
        """The most this device ever holds."""
        return self.terms.peak_bytes

    @property
    def in_use(self) -> bool:
        """Whether any part of the model is placed here."""
        return self.holds_embedding or self.holds_norm or self.layers is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class HostPlan:
    """What the process needs in host RAM."""

    usable_bytes: int | None
    """RAM that may be taken, by the cgroup's limit; None for a described machine."""
    limit: str = "physical"
    """Where usable_bytes comes from: "physical", "cgroup v1", "cgroup v2", "described", or
    "--max-memory"."""
    terms: HostTerms

    @property
    def peak_bytes(self) -> int:
        """The most the process holds in host RAM."""
        return self.terms.peak_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskPlan:
    """What the download needs on the disk that keeps it (HF_HOME)."""

    free_bytes: int | None
    """None for a described machine, or where it cannot be told."""
    needed_bytes: int
    """Bytes to fetch that are not in the cache yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """Another choice for the same model and machine."""

    format: str
    context: int
    concurrency: int
    fits: bool
    runnable: bool
    max_context: int
    """Largest context that fits in this format, 0 where none does."""
    shortfall_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirement:
    """Listed hardware on which the model would fit: equal devices in one machine."""

    format: str
    count: int
    accelerator: str
    """A name that --gpus takes."""
    free_bytes: int
    """Of each of them, idle."""
    context: int
    concurrency: int
    tokens_per_second: float | None
    """Predicted decode speed of one request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterPlan:
    """A LoRA adapter that is loaded beside the model's weights."""

    path: str
    """Its folder, absolute."""
    fingerprint: str
    """Digest of its tensors' names, shapes, ranks and scales; the loader refuses another one."""
    rank: int
    """The largest of its ranks."""
    num_weights: int
    """Linear layers that it changes."""
    num_parameters: int
    weights_bytes: int
    """Its part of the devices' `weights`."""
    warning: str | None = None
    """That it was made for another base model; None where nothing says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What goes where, whether it fits, and why not something better."""

    model: str
    """The name it was asked for by."""
    source: ModelSource
    fingerprint: str
    """Digest of the architecture's tensors; the loader refuses another model."""
    num_parameters: int
    format: str
    fits: bool
    runnable: bool
    """Whether an engine of this version can run it on such devices; `reasons` says why not."""
    not_runnable: str | None = None
    """Why no engine runs it, None where one does."""
    refused: str | None = None
    """Why `load` does not execute it although it fits: too slow without --force."""
    engine: str
    compute_dtype: str
    attention: str
    """transformers' name of the attention implementation."""
    kv_format: str
    context: int
    """Prompt and answer of one request, in tokens."""
    concurrency: int
    max_context: int
    """Largest context that fits with this format and concurrency, 0 where none does."""
    max_concurrency: int
    """Most requests at once that fit with this format and context, 0 where not one does."""
    pipeline: int
    """Devices that the layers are spread over, one after the other."""
    tensor_parallel: int
    offload: Literal["none", "cpu"] = "none"
    """Whether layers stay in host memory."""
    devices: tuple[DevicePlan, ...]
    host: HostPlan
    disk: DiskPlan
    shortfall_bytes: int
    """The least sum of what is missing over the devices, 0 where it fits."""
    alternatives: tuple[Alternative, ...]
    download_bytes: int
    tokens_per_second: TokensPerSecond
    load_s: float
    """Predicted seconds of loading, from files in the page cache."""
    reasons: tuple[str, ...]
    what_it_would_take: tuple[Requirement, ...] = ()
    """The smallest listed hardware for each format and count, where it was asked for."""
    cap_bytes: int | None = None
    """Most bytes of each device, enforced while running."""
    reserve_bytes: int = 0
    """Free memory of each device that is left alone."""
    prefill_chunk_tokens: int
    """A prompt is processed this many tokens at a time."""
    decoder_prefix: str = "model"
    """Name of the module that holds embedding, layers and norm."""
    extra_modules: tuple[str, ...] = ()
    """Modules beside the decoder, held where the embedding is."""
    quantized_checkpoint: str | None = None
    """quant_method of a checkpoint that is quantized already; None where loading quantizes."""
    tensor_formats: Mapping[str, str] = field(default_factory=dict)
    """Tensor → format, of a plan in "fit"; what is not named stays in the compute dtype."""
    search: bool = False
    """Whether block scales of 4-bit weights are searched for the least error while loading."""
    adapter: AdapterPlan | None = None
    """What is added to the model's linear layers; None for nothing."""
    schema: int = SCHEMA

    @property
    def devices_in_use(self) -> tuple[DevicePlan, ...]:
        """Devices that hold a part of the model, in order along it."""
        used = [device for device in self.devices if device.in_use]
        return tuple(sorted(used, key=lambda d: (not d.holds_embedding, d.layers or (1 << 30, 0))))

    @property
    def weight_format(self) -> Format:
        """What weights are stored in.

        Raises:
            InputError: It is no format of ours, but a checkpoint's own.
        """
        return mixture(self.tensor_formats) if self.format == FIT else held_format(self.format)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `plan --json` prints them (docs/1-planning.md)."""
        plain = asdict(self)
        for device, values in zip(self.devices, plain["devices"], strict=True):
            values["peak_bytes"] = device.peak_bytes
        plain["host"]["peak_bytes"] = self.host.peak_bytes
        return plain

    def to_json(self, *, indent: int | None = 2) -> str:
        """The plan as JSON, schema 1."""
        return json.dumps(self.as_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes, *, file: str = "plan") -> Plan:
        """Reads a plan back.

        Args:
            text: What `to_json` wrote.
            file: Name for the error.

        Raises:
            InputError: Not a plan of schema 1; the first wrong field is named.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            plan = TypeAdapter(cls).validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "JSON"
            raise InputError(
                f"{file}: not a plan of schema {SCHEMA}: {where}: {first['msg']}"
            ) from None
        if plan.schema != SCHEMA:
            raise InputError(f"{file}: plan schema {plan.schema} is not {SCHEMA}")
        if (problem := _impossible(plan)) is not None:
            raise InputError(f"{file}: not a plan of schema {SCHEMA}: {problem}")
        return plan

    def to_transformers(self) -> Mapping[str, Any]:
        """Plain values for `from_pretrained` (planning/handoffs/transformers.py)."""
        from oomproof.planning.handoffs.transformers import to_transformers

        return to_transformers(self)


def _impossible(plan: Plan) -> str | None:
    """What no plan that was made here can say; None where it is sound."""
    known: tuple[tuple[str, str, Collection[str]], ...] = (
        ("kv_format", plan.kv_format, KV_FORMATS),
        ("compute_dtype", plan.compute_dtype, tuple(DType)),
        ("engine", plan.engine, QUANTIZED_ROLES),
    )
    if (problem := _impossible_formats(plan)) is not None:
        return problem
    for what, value, allowed in known:
        if value not in allowed:
            return f"{what}: {value[:40]!r} is none of {', '.join(allowed)}"
    for what, number in (("context", plan.context), ("concurrency", plan.concurrency)):
        if number < 1:
            return f"{what}: {number} is not at least 1"
    if not plan.devices:
        return "devices: there is none"
    for position, device in enumerate(plan.devices):
        where = f"devices.{position}"
        if device.layers is not None and not 0 <= device.layers[0] <= device.layers[1]:
            return f"{where}.layers: {list(device.layers)} is no range of layers"
        sizes = {"usable_bytes": device.usable_bytes, **device.terms.as_dict()}
        for name, size in sizes.items():
            if size < 0:
                return f"{where}.{name}: {size} is negative"
    return None


def _impossible_formats(plan: Plan) -> str | None:
    if not is_known_format(plan.format):
        return f"format: {plan.format[:40]!r} is none of {', '.join(FORMATS)}"
    if bool(plan.tensor_formats) != (plan.format == FIT):
        return f"tensor_formats: a plan in {FIT} has them, and no other"
    for tensor, name in plan.tensor_formats.items():
        if name not in FORMATS:
            return f"tensor_formats.{tensor[:80]}: {name[:40]!r} is none of {', '.join(FORMATS)}"
    return None
