"""A model whose adapters are trained: frozen quantized weights, and LoRA on its linears (QLoRA).

QLoRA is Dettmers et al. 2023, arXiv:2305.14314. Everything that a step takes is allocated when the
model is built, by memory.training's numbers, or for as long as one phase of one layer lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

import torch

from oomproof.errors import InputError
from oomproof.formats import DType
from oomproof.loading.targets import LoadProgress
from oomproof.memory.training import TrainingTerms, kept_within, training_memory
from oomproof.memory.training_shape import Kept, TrainingShape
from oomproof.models.spec import ModelSpec
from oomproof.tuning import adapter_files
from oomproof.tuning.adapters import Adapters
from oomproof.tuning.averaging import check_alike
from oomproof.tuning.core import TrainingCore, TrainingStep
from oomproof.tuning.distributed import Ranks, current
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

    Of several ranks each has one and feeds it batches of its own; all run the same passes. After
    each backward pass gradients are the mean over ranks, as DistributedDataParallel's: nothing else
    may wrap it, and accelerate does not. Where losses are sums over `num_items_in_batch` of all
    ranks, as transformers' Trainer counts it, they are multiplied by the number of ranks.

    Args:
        spec: The model.
        core: What computes.
        adapters: What is trained.
        lora: Their settings.
        ranks: The processes that train it.
    """

    _is_accelerate_prepared = True
    """accelerate's word for a model that it neither wraps nor moves."""

    def __init__(
        self,
        spec: ModelSpec,
        core: TrainingCore,
        adapters: Adapters,
        lora: LoraSettings,
        ranks: Ranks,
    ) -> None:
        super().__init__()
        self.spec, self.lora, self.ranks = spec, lora, ranks
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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda` or `half` do: nothing where it is there already.

        Parameters are views of one tensor; copies of them would be trained and never be used.

        Raises:
            InputError: It would move.
        """
        del recurse
        now = self._adapters.values
        moved = fn(now[:1, :1])
        # "cpu:0" is the CPU too.
        same = (moved.device.type, moved.device.index or 0) == (
            now.device.type,
            now.device.index or 0,
        )
        if not same or moved.dtype is not now.dtype:
            raise InputError(
                f"a model that is trained stays in {now.dtype} on {now.device}, it cannot become "
                f"{moved.dtype} on {moved.device}",
                remedy="build it there",
            )
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._adapters.values.device

    @property
    def shape(self) -> TrainingShape:
        """What its buffers were made for."""
        return self._core.shape

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it gradients of ranks stay their own; the next backward pass averages the sums.

        By this name accelerate and transformers find it, where they accumulate gradients.
        """
        before, self._core.averages = self._core.averages, False
        try:
            yield
        finally:
            self._core.averages = before

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
        """Writes the adapter as peft does: adapter_config.json, adapter_model.safetensors.

        Of several ranks the first one does, and the others do not wait for it.
        """
        if not self.ranks.is_first:
            return
        tensors = dict(self._adapters.named())
        adapter_files.save(folder, tensors, self.lora, self.base_id)

    def load_adapter(self, folder: Path) -> None:
        """Reads such a folder; of several ranks each does.

        Raises:
            InputError: It is not this model's, not with these settings, or damaged; or ranks have
                read different ones.
        """
        adapter_files.load(folder, dict(self._adapters.named()), self.lora, self.spec)
        _check_alike(self._adapters, self.ranks, f"give all of them the files of {folder}")


def shape_of(
    spec: ModelSpec,
    lora: LoraSettings,
    compute_dtype: torch.dtype,
    options: TrainingOptions,
    *,
    ranks: int = 1,
) -> TrainingShape:
    """What the buffers of a training depend on, on each of several ranks; needs no device.

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
        ranks=ranks,
        sharded=options.sharded,
    )
    if options.limit_bytes is None:
        return shape
    if options.kept is not None:
        raise InputError("both kept and limit_bytes are given", remedy="give one of them")
    return kept_within(spec, shape, options.limit_bytes, optimizer=options.optimizer)


def build_training_model(  # noqa: PLR0913 - what a training depends on
    spec: ModelSpec,
    folder: Path | None,
    lora: LoraSettings,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    options: TrainingOptions,
    seed: int = 0,
    progress: LoadProgress | None = None,
    ranks: Ranks | None = None,
) -> TrainingModel:
    """Loads a model in its format, with fresh adapters: A random, B zero.

    Of several ranks each calls it, with the same arguments but for its device.

    Args:
        spec: The model, with the headers of its checkpoint where there is a folder.
        folder: Where its files are; None for random weights.
        lora: Of the adapters.
        device: A GPU or the CPU.
        compute_dtype: bfloat16 or float32; adapters are float32 beside either, as peft's.
        options: Shapes of a step, and what is spent on its speed.
        seed: Of the adapters and random weights; dropout draws from torch's own generator.
        progress: Told of bytes read.
        ranks: The processes that train it; None for those of torch's process group, if any.

    Raises:
        NotRunnableError: The model, or the format, is none that is trained here.
        PlanDoesNotFitError: A step takes more than the options' limit.
        InputError: Options that contradict each other, or those of other ranks.
        CheckpointError: A damaged file.
        LoadError: The checkpoint is not the model's.
        RankError: Another rank failed.
    """
    device = _checked(device, compute_dtype)
    check_trainable(spec, options.format)
    ranks = current() if ranks is None else ranks
    shape = shape_of(spec, lora, compute_dtype, options, ranks=ranks.size)
    # Before anything travels: parts of different sizes would be found by nobody.
    ranks.agree(_facts(spec, lora, shape, seed), device)
    with torch.no_grad():
        frozen = FrozenModel(
            spec,
            shape.format,
            shape.compute_dtype,
            device,
            ranks=ranks,
            sharded=shape.sharded,
        )
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
        InputError: An attention that does not compute this, a shape that is not the weights', or
            ranks that differ in what they train.
    """
    ranks = frozen.ranks
    if (shape.ranks, shape.is_sharded) != (ranks.size, frozen.sharded is not None):
        raise InputError(
            f"the shape is of {shape.ranks} ranks, sharded: {shape.is_sharded}; the weights are "
            f"of {ranks.size}, sharded: {frozen.sharded is not None}",
            remedy="make both alike",
        )
    device = frozen.memory.device
    ranks.agree(_facts(spec, lora, shape, seed), device)
    with torch.no_grad():
        adapters = Adapters(spec, lora, device, seed=seed)
        _check_alike(adapters, ranks, "run the same versions of torch on all ranks")
        core = TrainingCore(spec, frozen, adapters, shape, lora=lora, attention=attention)
    return TrainingModel(spec, core, adapters, lora, ranks)


def _facts(
    spec: ModelSpec, lora: LoraSettings, shape: TrainingShape, seed: int
) -> dict[str, object]:
    """What ranks have in common; what each keeps is its own matter."""
    return {
        "model": sorted(spec.config.items(), key=str),
        "adapter setting": lora,
        "training shape": replace(shape, kept=Kept()),
        "seed": seed,
    }


def _check_alike(adapters: Adapters, ranks: Ranks, remedy: str) -> None:
    with torch.no_grad():
        if not check_alike(adapters, ranks):
            raise InputError("the ranks have different adapters", remedy=remedy)


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
