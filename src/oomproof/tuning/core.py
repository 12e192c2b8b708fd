"""A step of training: forward through all layers, the loss, and backward through all of them.

One autograd function is the whole model: gradients of adapters go straight to their parameters,
and nothing in between belongs to autograd, which would keep it as it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from oomproof.engine.native.arena import Arena
from oomproof.engine.native.rotary import fill_rotary
from oomproof.errors import InputError
from oomproof.memory.arena import lay_out
from oomproof.memory.training_buffers import static_buffers
from oomproof.memory.training_shape import TrainingShape, widths_of
from oomproof.models.spec import ModelSpec
from oomproof.tuning.adapters import Adapters
from oomproof.tuning.attention import Documents
from oomproof.tuning.attention_choice import choose_attention
from oomproof.tuning.averaging import GradientAverage
from oomproof.tuning.frozen import FrozenModel
from oomproof.tuning.layer import LayerPasses, Step
from oomproof.tuning.layer_inputs import Checkpoints, OffloadedCheckpoints
from oomproof.tuning.loss import HeadLoss
from oomproof.tuning.operators import rms_norm
from oomproof.tuning.settings import LoraSettings

_RANK_STEP = 0x85EBCA6B
IGNORED = -100
"""The label of a token that does not count, as transformers has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A step's input."""

    ids: torch.Tensor
    """int64 [tokens]."""
    rows: torch.Tensor
    """int64 [counted]: tokens whose next one is a label."""
    labels: torch.Tensor
    """int64 [counted]."""
    scale: torch.Tensor
    """float32 [1]: one over what losses are divided by."""
    step: Step


class TrainingCore:
    """All buffers of training a model on one device, and what computes in them.

    Args:
        spec: The model.
        model: Its weights.
        adapters: Of its layers.
        shape: Of a step.
        lora: Of the adapters.
        attention: Name of an implementation.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model: FrozenModel,
        adapters: Adapters,
        shape: TrainingShape,
        *,
        lora: LoraSettings,
        attention: str,
    ) -> None:
        forward = spec.forward
        assert forward is not None
        self.shape, self._model, self._forward = shape, model, forward
        self._device = model.memory.device
        self._dropout = lora.dropout
        layout = lay_out(static_buffers(spec, shape))
        self.arena = Arena(layout, self._device)
        buffers = {name: self.arena[name] for name in layout.buffers}
        self._stream, self._rounded = buffers["stream"], buffers["rounded"]
        self._found = buffers["adapter_grads"]
        self._adapters = adapters
        widths = widths_of(spec)
        head_dim = widths.head_dim
        fill_rotary(buffers["rotary"], forward.rope, head_dim)
        places = buffers["checkpoints"]
        self._checkpoints = (
            OffloadedCheckpoints(places, spec.num_hidden_layers)
            if shape.offload_checkpoints
            else Checkpoints(places)
        )
        self._passes = LayerPasses(
            spec,
            forward,
            shape,
            buffers=buffers,
            adapters=adapters,
            attention=choose_attention(
                attention,
                device=self._device,
                dtype=self._rounded.dtype,
                heads=(widths.heads, widths.keys // head_dim),
                head_dim=head_dim,
                scale=forward.attention_scale,
            ),
            scale=lora.scale,
            dropout=lora.dropout,
        )
        self._norms = model.input_norms
        self._loss = HeadLoss(spec, forward, shape, model, buffers["losses"])
        self._passes_begun = 0
        self._step: Step | None = None
        ranks = model.ranks
        self._rank_seed = ranks.rank * _RANK_STEP
        self._average = GradientAverage(adapters, ranks) if ranks.size > 1 else None
        self.averages = True
        """Whether a backward pass ends with gradients that are averaged over ranks."""

    def prepare(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None,
        divisor: torch.Tensor | float | None,
        *,
        training: bool,
    ) -> Batch:
        """A batch as the passes take it; labels become those of the token before.

        It waits for the device where labels or positions are there: which tokens count, and where
        documents begin, must be known to launch anything.

        Raises:
            InputError: More tokens, or longer sequences, than there is room for; tokens, labels or
                positions that do not exist.
        """
        rows, length = ids.shape
        tokens = rows * length
        if tokens < 1:
            raise InputError(f"a batch of {rows} × {length} tokens has none")
        if tokens > self.shape.tokens or length > self.shape.positions:
            raise InputError(
                f"a batch of {rows} × {length:,} tokens is more than the {self.shape.tokens:,} "
                f"tokens, in sequences of {self.shape.positions:,}, that training was planned for",
                remedy="make smaller batches, or plan for these",
            )
        self._check_values(ids, labels, position_ids)
        positions, documents = self._documents(rows, length, position_ids)
        following = torch.full_like(labels, IGNORED)
        following[:, :-1] = labels[:, 1:]
        following = following.view(-1)
        counted = (following != IGNORED).nonzero().view(-1)
        wanted = following[counted]
        if divisor is None:
            divisor = float(max(1, len(counted)))
        if isinstance(divisor, torch.Tensor):
            scale = divisor.to(self._device, torch.float32).reciprocal().view(1)
        elif not divisor > 0:
            raise InputError(f"num_items_in_batch is {divisor:g}, it must be more than 0")
        else:
            scale = torch.full((1,), 1 / divisor, device=self._device)
        drops = training and self._dropout > 0
        step = Step(
            tokens=tokens,
            positions=positions,
            documents=documents,
            seed=self._drawn_seed() if drops else 0,
            drops=drops,
            trains=torch.is_grad_enabled(),
        )
        return Batch(
            ids=ids.reshape(-1).to(self._device, non_blocking=True),
            rows=counted.to(self._device, non_blocking=True),
            labels=wanted.to(self._device, non_blocking=True),
            scale=scale,
            step=step,
        )

    def _drawn_seed(self) -> int:
        """Of a step's dropout: another on each rank, whose generators may be seeded alike."""
        # torch's own generator: its state is in checkpoints of a training that goes on later.
        return (int(torch.randint(0x7FFFFFFF, ())) + self._rank_seed) & 0x7FFFFFFF

    def _check_values(
        self, ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None
    ) -> None:
        """Reading beyond the end of a table would be found much later, or never."""
        vocab = len(self._model.embedding)
        checked = [
            ("input_ids", ids, vocab),
            ("labels", labels.masked_fill(labels == IGNORED, 0), vocab),
        ]
        if position_ids is not None:
            checked.append(("position_ids", position_ids, self.shape.positions))
        # One transfer for all of them, wherever they are.
        found = [end.to(ids.device) for _, one, _ in checked for end in torch.aminmax(one)]
        ends = torch.stack(found).tolist()
        for (name, _, size), low, high in zip(checked, ends[::2], ends[1::2], strict=True):
            if low < 0 or high >= size:
                raise InputError(
                    f"{name} has {low if low < 0 else high}, which is not from 0 to {size - 1:,}",
                    remedy="make the batch with the model's own tokenizer, as it was planned",
                )

    def _documents(
        self, rows: int, length: int, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, Documents]:
        """(positions int32 [tokens], where documents begin)."""
        tokens = rows * length
        bounds: Sequence[int] = range(0, tokens + 1, length)
        if position_ids is None:
            positions = torch.arange(length, dtype=torch.int32, device=self._device).repeat(rows)
        else:
            begins = (position_ids == 0).view(rows, length).clone()
            begins[:, 0] = True
            bounds = [*begins.view(-1).nonzero().view(-1).tolist(), tokens]
            positions = position_ids.reshape(-1).to(self._device, torch.int32, non_blocking=True)
        packed = len(bounds) > rows + 1
        cumulative = None
        if packed:
            cumulative = torch.tensor(bounds, dtype=torch.int32).to(self._device, non_blocking=True)
        return positions, Documents(bounds=tuple(bounds), length=length, cumulative=cumulative)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The loss; leaves the gradient of the last hidden states where a backward pass follows.

        Hidden states, and their gradient, add up in float32. What a layer takes and its backward
        pass takes again is rounded, and so the same in both.
        """
        with self._on_device():
            return self._forward_pass(batch)

    def _forward_pass(self, batch: Batch) -> torch.Tensor:
        step, count = batch.step, len(self._model.layers)
        tokens = step.tokens
        self._passes_begun += 1
        self._step = step if step.trains else None
        stream, rounded = self._stream[:tokens], self._rounded[:tokens]
        self._passes.begin(tokens)
        x = self._checkpoints.place(0, tokens)
        torch.index_select(self._model.embedding, 0, batch.ids, out=x)
        if self._forward.embedding_multiplier != 1:
            x.mul_(self._forward.embedding_multiplier)
        stream.copy_(x)
        rms_norm(x, self._norms[0], self._forward.rms_norm_eps, rounded)
        for number in range(count):
            is_last = number == count - 1
            weights = self._model.take(number, None if is_last else number + 1)
            following = None
            if step.trains and not is_last:
                following = self._checkpoints.place(number + 1, tokens)
            norm = None if is_last else self._norms[number + 1]
            self._passes.forward(number, weights, step, following, norm)
            if step.trains:
                self._checkpoints.written(number, tokens)
        loss = self._loss.run(stream, batch.rows, batch.labels, batch.scale, trains=step.trains)
        if step.trains:
            rounded.copy_(stream)
        return loss

    def _on_device(self) -> AbstractContextManager[Any]:
        """What is launched below goes to whichever device is current."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    @property
    def passes_begun(self) -> int:
        """Forward passes so far."""
        return self._passes_begun

    def backward(self, grad_loss: torch.Tensor, begun: int) -> None:
        """Gradients of all adapters, added to those that they have.

        Args:
            grad_loss: Of the loss, [].
            begun: passes_begun after the loss's forward pass.

        Raises:
            RuntimeError: Another forward pass has begun since, or this was done before.
            RankError: Another rank is gone.
        """
        step = self._step
        if step is None or begun != self._passes_begun:
            raise RuntimeError(
                "the activations of this loss are gone: call backward() once after each forward(), "
                "before the next"
            )
        self._step = None
        with self._on_device():
            self._backward_pass(step, grad_loss)

    def _backward_pass(self, step: Step, grad_loss: torch.Tensor) -> None:
        tokens = step.tokens
        scale = grad_loss.detach().float().view(1)
        average = self._average if self.averages else None
        if average is not None:
            average.begin()
        for number in reversed(range(len(self._model.layers))):
            x = self._checkpoints.saved(number, tokens)
            weights = self._model.take(number, number - 1 if number else None)
            self._passes.backward(number, weights, step, x)
            if average is not None:
                average.adopt(number)
            # In float32 only here, where hidden states have fewer bits.
            self._adapters.take_grads(number, self._found, scale)
            if average is not None:
                average.done(number)
            self._checkpoints.done(number, tokens)
        if average is not None:
            average.finish()


class TrainingStep(torch.autograd.Function):
    """The loss of a batch; its backward pass is TrainingCore.backward."""

    @staticmethod
    def forward(  # noqa: D102 - autograd's
        ctx: Any, anchor: torch.Tensor, core: TrainingCore, batch: Batch
    ) -> torch.Tensor:
        del anchor
        loss = core.forward(batch)
        ctx.core, ctx.begun = core, core.passes_begun
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[None, None, None]:  # noqa: D102
        ctx.core.backward(grad_loss, ctx.begun)
        return None, None, None
