"""A model whose adapters are trained: frozen quantized weights, and LoRA on its linears (QLoRA).

QLoRA is Dettmers et al. 2023, arXiv:2305.14314. Everything that a step takes is allocated when the
model is built, by memory.training's numbers, or for as long as one phase of one layer lasts.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from oomproof.errors import InputError
from oomproof.formats import DType
from oomproof.loading.targets import LoadProgress
from oomproof.memory.training import TrainingTerms, kept_within, training_memory
from oomproof.memory.training_shape import Kept, TrainingShape
from oomproof.models.spec import ModelSpec
from oomproof.tuning import adapter_files
from oomproof.tuning.adapters import Adapters
from oomproof.tuning.core import TrainingCore, TrainingStep
from oomproof.tuning.frozen import FrozenModel, check_trainable
from oomproof.tuning.settings import LoraSettings, TrainingOptions

__all__ = [
    "LoraSettings",
    "TrainingModel",
    "TrainingOptions",
    "TrainingOutput",
    "build_training_model",
    "shape_of",
    "training_model_on",
]

_COMPUTE_DTYPES = (torch.bfloat16, torch.float32)


class TrainingOutput(NamedTuple):
    """What a step returns."""

    loss: torch.Tensor
    """float32 []."""


class TrainingModel(torch.nn.Module):
    """A causal language model; its parameters are its adapters, by peft's names.

    A loss has its backward pass once, before the next forward pass. Gradients go straight into
    `grad` of the parameters: hooks of theirs are not called.

    Args:
        spec: The model.
        core: What computes.
        adapters: What is trained.
        lora: Their settings.
    """

    def __init__(
        self, spec: ModelSpec, core: TrainingCore, adapters: Adapters, lora: LoraSettings
    ) -> None:
        super().__init__()
        self.spec, self.lora = spec, lora
        self.base_id = spec.source.path
        """What an adapter's config.json names as the model that it belongs to."""
        self._core, self._adapters = core, adapters
        for name, parameter in adapters.named():
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in module._modules:  # noqa: SLF001 - torch's own way to ask
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, parameter)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._adapters.values.device

    @property
    def shape(self) -> TrainingShape:
        """What its buffers were made for."""
        return self._core.shape

    def memory(self, optimizer: str = "adamw") -> TrainingTerms:
        """What a step takes, by what it is for; see memory.training.training_memory."""
        return training_memory(self.spec, self.shape, optimizer=optimizer)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> TrainingOutput:
        """The loss of predicting each label from the tokens before it.

        Args:
            input_ids: int64 [batch, tokens].
            labels: int64 [batch, tokens], as input_ids: they are shifted here. -100 does not count.
            position_ids: [batch, tokens], 0 where a document begins; documents do not see each
                other. None for one a row.
            num_items_in_batch: What the sum of losses is divided by; None for the labels counted.

        Raises:
            InputError: A batch that the plan has no room for, or tensors that do not fit together.
        """
        for name, tensor in (("labels", labels), ("position_ids", position_ids)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise InputError(
                    f"{name} is {list(tensor.shape)}, input_ids is {list(input_ids.shape)}"
                )
        core = self._core
        # Whatever precision is asked of others, this has its own.
        with torch.autocast(self.device.type, enabled=False):
            batch = core.prepare(
                input_ids, labels, position_ids, num_items_in_batch, training=self.training
            )
            anchor = next(self.parameters())
            if torch.is_grad_enabled() and anchor.requires_grad:
                loss: torch.Tensor = TrainingStep.apply(anchor, core, batch)  # type: ignore[no-untyped-call]
            else:
                with torch.no_grad():
                    loss = core.forward(batch)
        return TrainingOutput(loss=loss)

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter as peft does: adapter_config.json, adapter_model.safetensors."""
        tensors = dict(self._adapters.named())
        adapter_files.save(folder, tensors, self.lora, self.base_id)

    def load_adapter(self, folder: Path) -> None:
        """Reads such a folder.

        Raises:
            CheckpointError: It is not this model's, not with these settings, or damaged.
        """
        adapter_files.load(folder, dict(self._adapters.named()), self.lora)


def shape_of(
    spec: ModelSpec, lora: LoraSettings, compute_dtype: torch.dtype, options: TrainingOptions
) -> TrainingShape:
    """What the buffers of a training depend on; needs no device.

    Raises:
        PlanDoesNotFitError: A step takes more than the options' limit.
        InputError: Options that contradict each other.
    """
    shape = TrainingShape(
        tokens=options.tokens,
        positions=options.positions or options.tokens,
        sequences=options.sequences,
        compute_dtype=DType(str(compute_dtype).removeprefix("torch.")),
        format=options.format,
        rank=lora.rank,
        targets=lora.target_modules,
        dropout=lora.dropout > 0,
        kept=options.kept or Kept(attention=spec.num_hidden_layers),
        loss_tokens=options.loss_tokens,
        scratch_bytes=options.scratch_bytes,
        offload_checkpoints=options.offload_checkpoints,
    )
    if options.limit_bytes is None:
        return shape
    if options.kept is not None:
        raise InputError("both kept and limit_bytes are given", remedy="give one of them")
    return kept_within(spec, shape, options.limit_bytes, optimizer=options.optimizer)


def build_training_model(
    spec: ModelSpec,
    folder: Path | None,
    lora: LoraSettings,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    options: TrainingOptions,
    seed: int = 0,
    progress: LoadProgress | None = None,
) -> TrainingModel:
    """Loads a model in its format, with fresh adapters: A random, B zero.

    Args:
        spec: The model, with the headers of its checkpoint where there is a folder.
        folder: Where its files are; None for random weights.
        lora: Of the adapters.
        device: A GPU or the CPU.
        compute_dtype: bfloat16 or float32; adapters are float32 beside either, as peft's.
        options: Shapes of a step, and what is spent on its speed.
        seed: Of the adapters and random weights; dropout draws from torch's own generator.
        progress: Told of bytes read.

    Raises:
        NotRunnableError: The model, or the format, is none that is trained here.
        PlanDoesNotFitError: A step takes more than the options' limit.
        InputError: Options that contradict each other.
        CheckpointError: A damaged file.
        LoadError: The checkpoint is not the model's.
    """
    device = _checked(device, compute_dtype)
    check_trainable(spec, options.format)
    shape = shape_of(spec, lora, compute_dtype, options)
    with torch.no_grad():
        frozen = FrozenModel(spec, shape.format, shape.compute_dtype, device)
        frozen.load(folder, seed=seed, progress=progress)
    return training_model_on(frozen, spec, lora, shape, attention=options.attention, seed=seed)


def training_model_on(
    frozen: FrozenModel,
    spec: ModelSpec,
    lora: LoraSettings,
    shape: TrainingShape,
    *,
    attention: str = "auto",
    seed: int = 0,
) -> TrainingModel:
    """Fresh adapters and buffers on weights that are loaded.

    Args:
        frozen: The weights.
        spec: Their model.
        lora: Of the adapters.
        shape: Of a step; see shape_of.
        attention: "auto", "flash", "cudnn" or "plain".
        seed: Of the adapters.

    Raises:
        InputError: An attention that does not compute this.
    """
    with torch.no_grad():
        adapters = Adapters(spec, lora, frozen.memory.device, seed=seed)
        core = TrainingCore(spec, frozen, adapters, shape, lora=lora, attention=attention)
    return TrainingModel(spec, core, adapters, lora)


def _checked(device: torch.device, compute_dtype: torch.dtype) -> torch.device:
    """The device with its index."""
    if compute_dtype not in _COMPUTE_DTYPES:
        raise InputError(
            f"{compute_dtype} is not trained in: its gradients overflow",
            remedy="use bfloat16, or float32",
        )
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device
