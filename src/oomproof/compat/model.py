"""Loads a transformers model exactly as a plan says, from our own reading of its files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig

from oomproof.compat.adapter import add_adapter, import_peft
from oomproof.compat.verify import verify_parameters
from oomproof.errors import CheckpointError, LoadError, OomproofError
from oomproof.loading.random_tensors import RandomTensors
from oomproof.loading.reader import CheckpointReader, Progress
from oomproof.models.spec import CheckpointSpec, ModelSpec
from oomproof.planning.handoffs.transformers import device_map, quantization_settings
from oomproof.planning.plan import Plan

_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Buffers that old checkpoints carry and models compute for themselves."""


def load_model(
    plan: Plan,
    spec: ModelSpec,
    folder: Path,
    *,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A `transformers.PreTrainedModel` in evaluation mode, placed and quantized by the plan.

    With an adapter it is a `peft.PeftModel` around one.

    Args:
        plan: What goes where, in which format.
        spec: The model, with the headers of its checkpoint.
        folder: Where its files are.
        progress: Told of every buffer read.
        trust_remote_code: Lets transformers run code that the model's folder ships.

    Raises:
        CheckpointError: A damaged file, or a value that is not finite.
        LoadError: transformers found parameters missing, unexpected or mis-shaped.
        PlanMismatchError: A loaded parameter differs from the plan.
    """
    if spec.checkpoint is None:
        raise CheckpointError(str(folder), "holds no safetensors files")
    with _in_our_words(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    generation_config = _read_generation_config(folder)
    reader = CheckpointReader(
        folder, _without_ignored(spec.checkpoint), _device_finder(device_map(plan)), progress
    )
    model = _load(plan, spec, config, reader, str(folder / "config.json"))
    model.config.name_or_path = str(folder)
    if generation_config is not None:
        model.generation_config = generation_config
    return model if spec.adapter is None else add_adapter(model, spec.adapter, plan)


def load_random_model(
    plan: Plan, spec: ModelSpec, *, progress: Progress | None = None, seed: int = 0
) -> Any:
    """As `load_model`, with random weights made on their devices instead of a checkpoint's.

    Raises:
        CheckpointError: transformers cannot use the model's config.
        LoadError: transformers found parameters missing, unexpected or mis-shaped.
        PlanMismatchError: A loaded parameter differs from the plan.
    """
    location = f"{spec.source.path}, config.json"
    with _in_our_words(location):
        config = AutoConfig.for_model(**spec.config)
    source = RandomTensors(spec, _device_finder(device_map(plan)), progress, seed=seed)
    model = _load(plan, spec, config, source, location)
    return model if spec.adapter is None else add_adapter(model, spec.adapter, plan)


class _TensorSource(Protocol):
    def open(self) -> AbstractContextManager[Mapping[str, Any]]: ...


def _load(plan: Plan, spec: ModelSpec, config: Any, source: _TensorSource, location: str) -> Any:
    """transformers' model with the source's tensors, as planned, and compared with the plan."""
    model_class = getattr(transformers, spec.architecture)
    placed = device_map(plan)
    settings = quantization_settings(plan)
    _quiet_libraries()
    with (
        _in_our_words(location),
        source.open() as tensors,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map=placed,
            dtype=getattr(torch, plan.compute_dtype),
            attn_implementation=plan.attention,
            quantization_config=None if settings is None else BitsAndBytesConfig(**settings),
            output_loading_info=True,
        )
    _refuse_partial(location, info)
    model.eval()
    verify_parameters(model, plan, spec)
    return model


@contextmanager
def _in_our_words(file: Path | str) -> Iterator[None]:
    """Whatever transformers stumbles over becomes one error that names the file.

    Its configs and loaders raise a dozen types for a wrong value. Running out of memory is no
    fault of the file and goes on as it is, and so does what we raise ourselves.
    """
    try:
        yield
    except (OomproofError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            str(file), f"transformers cannot use it: {type(error).__name__}: {lines[0][:200]}"
        ) from error


def _read_generation_config(folder: Path) -> GenerationConfig | None:
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    with _in_our_words(path):
        return GenerationConfig.from_pretrained(folder)


def import_libraries(plan: Plan, spec: ModelSpec) -> None:
    """Imports what loading will use, so that its own memory is not taken for the model's."""
    _quiet_libraries()
    getattr(transformers, spec.architecture)
    if quantization_settings(plan) is not None:
        import bitsandbytes  # noqa: F401
    if plan.adapter is not None:
        import_peft()


def _without_ignored(checkpoint: CheckpointSpec) -> CheckpointSpec:
    kept = tuple(t for t in checkpoint.tensors if not t.name.endswith(_IGNORED_SUFFIXES))
    return CheckpointSpec(tensors=kept, files=checkpoint.files)


def _device_finder(placed: dict[str, int | str]) -> Any:
    """Checkpoint tensor name → device: the longest module name that is a prefix of it."""

    def device_of(name: str) -> torch.device:
        module = name
        while module not in placed and module:
            module = module.rpartition(".")[0]
        # A name that transformers renames while loading is read to the first device, and moved.
        target = placed.get(module, next(iter(placed.values())))
        return torch.device("cuda", target) if isinstance(target, int) else torch.device(target)

    return device_of


def _refuse_partial(location: str, info: dict[str, Any]) -> None:
    """transformers only warns of what it could not load; a plan is not met that way."""
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mis-shaped": sorted(str(key) for key in info["mismatched_keys"]),
        "failed": sorted(str(message) for message in info.get("error_msgs", ())),
    }
    for what, names in problems.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise LoadError(
                f"{location}: {len(names)} {what} parameters: {shown}",
                remedy="the checkpoint does not belong to its config.json; download it again",
            )


def _quiet_libraries() -> None:
    """Leaves progress and warnings to us."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
