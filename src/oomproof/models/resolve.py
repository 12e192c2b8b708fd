"""From the name that a user gives to a ModelSpec: bundled, folder, catalog or hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from oomproof.errors import CheckpointError, ModelNotFoundError
from oomproof.models.architectures import build_spec
from oomproof.models.catalog import find, suggest
from oomproof.models.config import read_config
from oomproof.models.quantization import (
    MAX_QUANT_STATE_BYTES,
    PLAIN_DTYPES,
    parts_of_modules,
)
from oomproof.models.quantized import CheckpointQuantization
from oomproof.models.spec import (
    CheckpointSpec,
    CheckpointTensor,
    ModelSource,
    ModelSpec,
    Role,
    TensorSpec,
)

MAX_NAME = 4096
"""Characters of a name, the longest path that Linux takes."""
BUNDLED = "tiny"
"""Name of the model that the package ships."""


def bundled_folder() -> Path:
    """Where the bundled model's files are."""
    return Path(__file__).parent / "bundled" / BUNDLED


def resolve(name: str, *, revision: str | None = None, allow_pickle: bool = False) -> ModelSpec:
    """The model of that name; no weight is read, and the catalog and folders need no network.

    The order is: `tiny`, a folder, a name of the catalog (its hub id answers too, unless a
    revision is asked for), a hub id. Where `allow_pickle`, a folder that has its weights as pickles
    only is converted first, in a process of its own (models/pickled.py), and the model's source is
    what that made.

    Raises:
        ModelNotFoundError: Nothing answers to the name.
        ConfigError: Its config.json is wrong.
        CheckpointError: Its files are damaged, missing or unsafe.
    """
    if name == BUNDLED:
        return _from_folder(bundled_folder(), id=BUNDLED)
    if len(name) > MAX_NAME or not name.isprintable():
        shown = name if len(name) <= 60 else name[:60] + "…"
        raise ModelNotFoundError(
            f"{shown!r} is no name of a model",
            remedy=f"give at most {MAX_NAME} printable characters",
        )
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except RuntimeError:  # no such user
        raise ModelNotFoundError(f"{name!r}: there is no such home folder") from None
    except OSError as error:
        raise ModelNotFoundError(f"{name}: cannot be looked at ({error.strerror})") from None
    if exists or _is_path(name):
        return _from_folder(path, id=name, allow_pickle=allow_pickle)
    entry = find(name)
    if entry is not None and revision is None:
        return entry.spec(id=name)
    return _from_hub(name, revision=revision)


def with_checkpoint(spec: ModelSpec) -> ModelSpec:
    """The same model with the headers of its files, ready to be loaded.

    Raises:
        ModelNotFoundError: The hub does not have it.
        CheckpointError: It has no safetensors files, or they are not this model's.
    """
    if spec.checkpoint is None and spec.source.kind == "catalog":
        spec = _from_hub(spec.source.path, revision=spec.source.revision)
    if spec.checkpoint is None:
        raise CheckpointError(
            spec.source.path,
            "holds no safetensors weights",
            remedy="give a folder or repository with model.safetensors",
        )
    return spec


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _from_folder(
    path: Path,
    *,
    id: str,  # noqa: A002
    allow_pickle: bool = False,
) -> ModelSpec:
    from oomproof.models.folder import read_folder

    if allow_pickle:
        from oomproof.models.pickled import unpickled

        path = unpickled(path)
    contents = read_folder(path)
    spec = build_spec(
        read_config(contents.config, file=contents.config_file),
        id=id,
        source=ModelSource(kind="folder", path=str(path)),
        file=contents.config_file,
        checkpoint=contents.checkpoint,
    )
    if contents.checkpoint is not None:
        check_tensors(spec, contents.checkpoint, location=str(path))
    return spec


def _from_hub(name: str, *, revision: str | None) -> ModelSpec:
    from oomproof.models.hub import is_hub_id, read_hub

    close = suggest(name, BUNDLED)
    hint = f"did you mean {' or '.join(close)}?" if close else "see docs/3-models.md for the names"
    if not is_hub_id(name) or "/" not in name:
        raise ModelNotFoundError(
            f"{name!r} is no folder here, no hub id (org/name), and not in the catalog", remedy=hint
        )
    contents = read_hub(name, revision=revision)
    spec = build_spec(
        read_config(contents.config, file=contents.config_location),
        id=name,
        source=ModelSource(kind="hub", path=contents.repo, revision=contents.commit),
        file=contents.config_location,
        checkpoint=contents.checkpoint,
    )
    spec = replace(spec, download_bytes=contents.download_bytes, cached_bytes=contents.cached_bytes)
    if contents.checkpoint is not None:
        check_tensors(spec, contents.checkpoint, location=contents.config_location)
    return spec


def check_tensors(spec: ModelSpec, checkpoint: CheckpointSpec, *, location: str) -> None:
    """Compares the checkpoint's tensors with what the config describes.

    Mixtures of experts and models with a vision tower are published under other names than
    transformers gives them; theirs are compared while loading.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    if spec.num_experts or spec.decoder_prefix != "model":
        return
    quantization = spec.checkpoint_quantization
    if quantization is not None and quantization.format is None:
        return
    found = {tensor.name: tensor for tensor in checkpoint.tensors}
    parts = parts_of_modules(checkpoint)
    for tensor in spec.tensors:
        if quantization is not None and tensor.role is Role.LINEAR and not tensor.kept:
            if quantization.parts is None:
                _check_quantized(tensor, quantization, parts, location)
            else:
                _check_parts(tensor, quantization, found, location)
            continue
        stored = found.get(tensor.name)
        if stored is None:
            raise CheckpointError(
                location,
                f"config.json describes {tensor.name!r}, which the weights lack",
                remedy="config and weights do not belong together; download both again",
            )
        if stored.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                stored.file, f"{tensor.name!r} holds {stored.dtype}, not 16- or 32-bit floats"
            )
        if stored.shape != tensor.shape:
            raise CheckpointError(
                stored.file,
                f"{tensor.name!r} has shape {list(stored.shape)}, "
                f"config.json describes {list(tensor.shape)}",
                remedy="config and weights do not belong together; download both again",
            )


def _check_quantized(
    tensor: TensorSpec,
    quantization: CheckpointQuantization,
    parts: Mapping[str, Mapping[str, CheckpointTensor]],
    location: str,
) -> None:
    """Compares what a quantized checkpoint holds for a linear layer with what its config says."""
    weight_format = quantization.format
    assert weight_format is not None
    module = tensor.name.removesuffix(".weight")
    held = parts.get(module, {})
    # bitsandbytes writes its statistics under names of their own; the codes must be there.
    codes, *others = weight_format.components(*tensor.shape)
    expected = [codes] if quantization.method == "bitsandbytes" else [codes, *others]
    for part in expected:
        found = held.get(part.name)
        if found is None:
            raise CheckpointError(
                location,
                f"config.json says {quantization.method}, and the weights lack "
                f"{f'{module}.{part.name}'!r}",
                remedy="config and weights do not belong together; download both again",
            )
        if prod(found.shape) != part.numel:
            raise CheckpointError(
                found.file,
                f"{found.name!r} has {prod(found.shape):,} elements, "
                f"{weight_format.name} of {list(tensor.shape)} has {part.numel:,}",
                remedy="config and weights do not belong together; download both again",
            )


def _check_parts(
    tensor: TensorSpec,
    quantization: CheckpointQuantization,
    found: Mapping[str, CheckpointTensor],
    location: str,
) -> None:
    """Compares every tensor that the native engine reads for a weight with its layout."""
    assert quantization.format is not None
    assert quantization.parts is not None
    for part in quantization.parts(tensor.name, tensor.shape):
        held = found.get(part.name)
        if held is None and not part.required:
            continue
        if held is None:
            raise CheckpointError(
                location,
                f"config.json says {quantization.format.name}, and the weights lack {part.name!r}",
                remedy="config and weights do not belong together; download both again",
            )
        if part.shape is None:
            fits = len(held.shape) == 1 and 0 < held.size_bytes <= MAX_QUANT_STATE_BYTES
            fits = fits and held.dtype is part.dtype
            expected = f"at most {MAX_QUANT_STATE_BYTES} bytes"
        else:
            fits, expected = part.accepts(held.dtype, held.shape), str(list(part.shape))
        if not fits:
            raise CheckpointError(
                held.file,
                f"{held.name!r} is {held.dtype} {list(held.shape)}, "
                f"{quantization.format.name} of {list(tensor.shape)} has {part.dtype} {expected}",
                remedy="config and weights do not belong together; download both again",
            )
