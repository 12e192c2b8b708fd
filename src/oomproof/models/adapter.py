"""Reads a LoRA adapter's folder, as peft writes it, without its weights.

LoRA (arXiv:2106.09685) changes a linear layer's weight by scale × B A, of a small rank. The folder
has adapter_config.json and adapter_model.safetensors. It comes from whoever published the adapter:
what it says is honoured exactly, or refused with the file and the field or tensor named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from oomproof.errors import CheckpointError
from oomproof.formats import DType
from oomproof.models.adapter_config import MERGE, AdapterConfig, read_adapter_config
from oomproof.models.config import MAX_CONFIG_BYTES, ConfigReader, read_config, shown
from oomproof.models.folder import list_folder, read_bounded, read_shard
from oomproof.models.spec import CheckpointSpec, CheckpointTensor, ModelSpec, Role, TensorSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PICKLE_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_HALVES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_DTYPES = frozenset({DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16})

Halves = dict[str, CheckpointTensor]
"""A module's "A" and "B"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedWeight:
    """A weight of the model and the two factors that change it: by scale × B A."""

    weight: str
    """The model's name of it: "model.layers.0.self_attn.q_proj.weight"."""
    layer: int
    shape: tuple[int, int]
    """Of the weight: [rows, columns]."""
    rank: int
    scale: float
    """lora_alpha / r, or lora_alpha / √r where use_rslora."""
    a: CheckpointTensor
    """[rank, columns]."""
    b: CheckpointTensor
    """[rows, rank]."""

    @property
    def module(self) -> str:
        """Name of the linear layer."""
        return self.weight.removesuffix(".weight")


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """A LoRA adapter of one model, before any of its weights is read."""

    path: str
    """Its folder, absolute."""
    weights: tuple[AdaptedWeight, ...]
    """In the order of the model's tensors."""
    checkpoint: CheckpointSpec
    """Its one file."""
    warning: str | None = None
    """That it names another base model than this one, whose shapes it has."""

    @cached_property
    def by_weight(self) -> Mapping[str, AdaptedWeight]:
        """Name of a weight → what changes it."""
        return {one.weight: one for one in self.weights}

    @property
    def name(self) -> str:
        """Of its folder."""
        return Path(self.path).name

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(one.rank for one in self.weights)

    @property
    def num_parameters(self) -> int:
        """Elements of all A and B."""
        return sum(one.rank * sum(one.shape) for one in self.weights)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what a plan depends on: names, shapes, ranks, scales and element types."""
        digest = hashlib.sha256()
        for one in self.weights:
            types = f"{one.a.dtype}:{one.b.dtype}"
            digest.update(f"{one.weight}:{one.shape}:{one.rank}:{one.scale}:{types};".encode())
        return digest.hexdigest()[:16]


def with_adapter(spec: ModelSpec, folder: str | Path) -> ModelSpec:
    """The same model, changed by the adapter in a folder.

    Raises:
        ModelNotFoundError: There is no such folder.
        ConfigError: adapter_config.json asks for what is not computed here.
        CheckpointError: The weights are missing, damaged, unsafe, or not this model's.
    """
    return replace(spec, adapter=read_adapter(Path(folder), spec))


def read_adapter(folder: Path, spec: ModelSpec) -> AdapterSpec:
    """The adapter in a folder, compared tensor by tensor with the model that it changes.

    Raises:
        OomproofError: As `with_adapter`.
    """
    try:
        folder = folder.expanduser().absolute()
    except RuntimeError:
        raise CheckpointError(str(folder), "there is no such home folder") from None
    _require_files(folder)
    config_file = folder / CONFIG_FILE
    data = read_bounded(config_file, bound_bytes=MAX_CONFIG_BYTES)
    config = read_adapter_config(
        ConfigReader(values=read_config(data, file=str(config_file)), file=str(config_file))
    )
    shard = read_shard(folder / WEIGHTS_FILE)
    location = str(folder / WEIGHTS_FILE)
    linears = {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in spec.tensors
        if tensor.role is Role.LINEAR and tensor.layer is not None and len(tensor.shape) == 2
    }
    pairs = _paired(shard.tensors, linears, location=location)
    weights = tuple(
        _adapted(tensor, pairs[module], config, location=location)
        for module, tensor in linears.items()
        if module in pairs
    )
    _compare_with_targets(config, pairs, linears, location=location)
    return AdapterSpec(
        path=str(folder),
        weights=weights,
        checkpoint=CheckpointSpec(tensors=shard.tensors, files=((shard.file, shard.size_bytes),)),
        warning=_other_base(config.base_model, spec),
    )


def _require_files(folder: Path) -> None:
    names = list_folder(folder)
    missing = next((name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in names), None)
    if missing == WEIGHTS_FILE and _PICKLE_FILE in names:
        raise CheckpointError(
            str(folder / _PICKLE_FILE),
            "is a pickle, which runs code when it is read",
            remedy=f"where you trust it, load it with peft, whose save_pretrained writes "
            f"{WEIGHTS_FILE}",
        )
    if missing is not None:
        raise CheckpointError(
            str(folder), f"has no {missing}", remedy="give the folder that peft's adapter is in"
        )


def _paired(
    tensors: Iterable[CheckpointTensor], linears: Mapping[str, TensorSpec], *, location: str
) -> dict[str, Halves]:
    """Module → its two tensors."""
    pairs: dict[str, Halves] = {}
    for tensor in tensors:
        suffix = next((end for end in _HALVES if tensor.name.endswith(end)), None)
        if suffix is None or not tensor.name.startswith(_PREFIX):
            raise CheckpointError(
                location,
                f"tensor {shown(tensor.name)} is no lora_A or lora_B of a linear layer",
                remedy=MERGE,
            )
        module = tensor.name.removeprefix(_PREFIX).removesuffix(suffix)
        if module not in linears:
            raise CheckpointError(
                location,
                f"tensor {shown(tensor.name)} belongs to no linear layer of the model's decoder",
                remedy="give the adapter's own base model; an adapter of lm_head or of an "
                "embedding has to be merged with peft",
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                location,
                f"tensor {shown(tensor.name)} holds {tensor.dtype}, not float32, bfloat16 or "
                "float16",
                remedy="save the adapter in 16 bits",
            )
        pairs.setdefault(module, {})[_HALVES[suffix]] = tensor
    for module, halves in pairs.items():
        for half in _HALVES.values():
            if half not in halves:
                raise CheckpointError(
                    location,
                    f"tensor '{_PREFIX}{module}.lora_{half}.weight' is missing",
                    remedy="download it again",
                )
    if not pairs:
        raise CheckpointError(location, "holds no tensors", remedy="download it again")
    return pairs


def _adapted(
    tensor: TensorSpec, halves: Halves, config: AdapterConfig, *, location: str
) -> AdaptedWeight:
    module = tensor.name.removesuffix(".weight")
    (rows, columns), rank = tensor.shape, config.rank_of(module)
    for half, expected in (("A", (rank, columns)), ("B", (rows, rank))):
        found = halves[half]
        if found.shape != expected:
            raise CheckpointError(
                location,
                f"tensor {shown(found.name)} is {list(found.shape)}; with rank {rank} of "
                f"{CONFIG_FILE} this model needs {list(expected)}",
                remedy="give the adapter's own base model",
            )
    assert tensor.layer is not None
    return AdaptedWeight(
        weight=tensor.name,
        layer=tensor.layer,
        shape=(rows, columns),
        rank=rank,
        scale=config.scale_of(module),
        a=halves["A"],
        b=halves["B"],
    )


def _compare_with_targets(
    config: AdapterConfig,
    pairs: Mapping[str, Halves],
    linears: Mapping[str, TensorSpec],
    *,
    location: str,
) -> None:
    """That the file has what the config targets, and nothing else, where names say it."""
    for module, tensor in linears.items():
        assert tensor.layer is not None
        targeted = config.targets(module, tensor.layer)
        if targeted is True and module not in pairs:
            raise CheckpointError(
                location,
                f"has no lora_A and lora_B of {module}, which {CONFIG_FILE} targets",
                remedy="download it again",
            )
        if targeted is False and module in pairs:
            raise CheckpointError(
                location,
                f"has lora_A and lora_B of {module}, which {CONFIG_FILE} does not target",
                remedy="config and weights do not belong together; download both again",
            )


def _other_base(base: str | None, spec: ModelSpec) -> str | None:
    def last(name: str) -> str:
        return name.rstrip("/").rpartition("/")[2].lower()

    if base is None or last(base) in {last(spec.id), last(spec.source.path)}:
        return None
    return (
        f"the adapter names {shown(base)} as its base model, and this is {spec.id}: their shapes "
        "agree, their weights may not"
    )
