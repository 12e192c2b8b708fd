"""What errors of each group of weights cost on a text: sensitivities for `--format fit`.

Windows of the text pass the model once forwards and once back, layer by layer: a layer's weights
are read, used for all windows, and replaced by the next layer's. Forwards the hidden states before
each layer are kept; at the end a random gradient whose covariance is the Fisher information of the
predictions begins (one draw stands for all tokens, as those of different tokens are independent),
and going back each layer is computed once more with gradients. backward.py says what each product
adds. The sum over a group is its damage in nats a token for a relative squared error of 1.

It costs the operations of three forward passes over 2,048 tokens and two readings of the
checkpoint: by that count 1e14 for an 8B, some minutes of a processor, some seconds of a GPU.
Memory: a layer as the checkpoint has it and in the compute dtype, and the hidden states between
all layers. What is found is kept by the digests of files and text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from oomproof.engine.native.layout import name_in_layer
from oomproof.engine.native.rotary import fill_rotary
from oomproof.errors import InputError, NotRunnableError, PlanDoesNotFitError
from oomproof.evaluation.backward import decoder_layer, fisher_noise, rms_norm, weight_cost
from oomproof.evaluation.devices import torch_device
from oomproof.evaluation.needs import LOGITS_BYTES, needs_of
from oomproof.evaluation.streamed import StreamedWeights
from oomproof.evaluation.variants import plain
from oomproof.evaluation.windows import TextTokenizer, read_text, refuse_unknown_tokens
from oomproof.formats import DType
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import DeviceSpec
from oomproof.home import home_folder
from oomproof.loading.weight_errors import key_of, read_kept, write_kept
from oomproof.memory.profiles import engine_profile
from oomproof.models.forward import ForwardSpec
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.damage import WeightErrors, group_of, groups_of
from oomproof.units import format_bytes

WINDOWS, CONTEXT = 8, 256
"""Twice as many change a group's sensitivity by 3 % on the bundled model."""
_VERSION = 1
"""Of what is kept; it changes when measuring does."""
_FIELD = "sensitivities"
_SEED = 0

Told = Callable[[int, int], None]
"""Called with (bytes of the checkpoint done with, bytes in all)."""


def calibrated(
    errors: WeightErrors,
    folder: Path,
    spec: ModelSpec,
    text: Path,
    *,
    device: DeviceSpec | None = None,
    environ: Mapping[str, str] = os.environ,
    told: Told | None = None,
) -> WeightErrors:
    """The errors with sensitivities that were measured on a text, now or before.

    Args:
        errors: Of the weights.
        folder: Where the model's files are.
        spec: The model, with the headers of its checkpoint.
        text: A file of UTF-8 text.
        device: Where it is measured; None for the processor.
        environ: Says where it is kept between plans.
        told: Told of what is done.

    Raises:
        InputError: The text cannot be read, or is too short.
        NotRunnableError: The native engine does not compute the model.
        PlanDoesNotFitError: There is too little memory.
        CheckpointError, LoadError: As load_checkpoint.
    """
    assert spec.checkpoint is not None
    if spec.forward is None:
        raise NotRunnableError(
            f"{spec.id} cannot be calibrated: {spec.not_native}", remedy="leave --calibration out"
        )
    words = read_text(text, WINDOWS * CONTEXT)
    digest = hashlib.sha256(words.encode()).hexdigest()
    key = key_of(folder, spec, spec.checkpoint, (_VERSION, WINDOWS, CONTEXT, digest))
    kept = home_folder(environ) / "calibrations" / f"{key}.json"
    wanted = groups_of(spec, frozenset({Role.LINEAR})).keys()
    found = (read_kept(kept) or {}).get(_FIELD, {})
    if found.keys() != wanted:
        from oomproof.compat.tokenizer import TransformersTokenizer, read_generation_defaults

        tokenizer = TransformersTokenizer(folder, defaults=read_generation_defaults(folder))
        name = f"calibration {str(text)!r}"
        inputs = cut_inputs(words, tokenizer, _context(spec), name=name)
        refuse_unknown_tokens(inputs, spec.vocab_size, name=name)
        found = sensitivities(folder, spec, spec.forward, inputs, device=device, told=told)
        write_kept(kept, {_FIELD: found})
    source = f"{errors.source}, weighed by what they cost on {text.name}"
    return replace(errors, sensitivities=found, source=source)


def cut_inputs(
    text: str, tokenizer: TextTokenizer, context: int, *, name: str
) -> list[tuple[int, ...]]:
    """Windows spread evenly over a text, each beginning as documents do.

    Raises:
        InputError: It has fewer tokens than one window.
    """
    prefix = tokenizer.prefix[: context - 1]
    ids, _ = tokenizer.encode_with_ends(text)
    length = context - len(prefix)
    count = min(WINDOWS, len(ids) // length)
    if count < 1:
        raise InputError(
            f"{name} has {len(ids):,} tokens, one window needs {length:,}",
            remedy="use a longer text",
        )
    starts = [number * (len(ids) - length) // max(1, count - 1) for number in range(count)]
    return [(*prefix, *ids[start : start + length]) for start in starts]


def sensitivities(
    folder: Path,
    spec: ModelSpec,
    forward: ForwardSpec,
    inputs: Sequence[Sequence[int]],
    *,
    device: DeviceSpec | None = None,
    told: Told | None = None,
) -> dict[str, float]:
    """Group → nats a token for a relative squared error of 1, to second order.

    Args:
        folder: Where the model's files are.
        spec: The model, with the headers of its checkpoint.
        forward: Its numbers.
        inputs: Windows of tokens, all as long.
        device: Where it is measured; None for the processor.
        told: Told of what is done.

    Raises:
        PlanDoesNotFitError: There is too little memory.
        CheckpointError, LoadError: As load_checkpoint.
    """
    sweep = _Sweep(folder, spec, forward, inputs, device, told)
    try:
        sweep.forwards()
        sweep.begin()
        return sweep.back()
    finally:
        if sweep.device.type == "cuda":
            del sweep
            torch.cuda.empty_cache()


def _context(spec: ModelSpec) -> int:
    return min(CONTEXT, spec.max_position_embeddings)


class _Sweep:
    """All windows, forwards and back."""

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        forward: ForwardSpec,
        inputs: Sequence[Sequence[int]],
        device: DeviceSpec | None,
        told: Told | None,
    ) -> None:
        hardware = probe()
        place = device or DeviceSpec(
            index=0,
            name="cpu",
            kind="cpu",
            total_bytes=hardware.host.total_ram_bytes,
            free_bytes=hardware.host.available_ram_bytes,
        )
        # bfloat16 is slow on processors without its instructions.
        dtype = DType.BFLOAT16 if place.kind == "cuda" else DType.FLOAT32
        reference = plain("bf16" if dtype is DType.BFLOAT16 else "fp32")
        count, context = len(inputs), len(inputs[0])
        needs = needs_of(
            spec,
            (reference,),
            context=context,
            compute_dtype=dtype,
            device=place,
            hardware=hardware,
        )
        size = (spec.num_hidden_layers + 1, count, context, spec.hidden_size)
        state_bytes = size[0] * count * context * spec.hidden_size * dtype.itemsize
        on_cpu = place.kind == "cpu"
        needed = needs.device_bytes + state_bytes + _layer_bytes(spec, context)
        needed += needs.host_bytes if on_cpu else 0
        if needed > place.free_bytes:
            raise PlanDoesNotFitError(
                f"calibrating {spec.id} needs {format_bytes(needed)} of {place.name}, "
                f"{format_bytes(place.free_bytes)} are free",
                shortfall_bytes=needed - place.free_bytes,
                remedy="leave --calibration out",
            )
        self.device = torch_device(place)
        self._spec, self._forward, self._told = spec, forward, told
        self._inputs = torch.tensor([list(row) for row in inputs], device=self.device)
        self._weights = StreamedWeights(
            spec,
            folder,
            (reference,),
            dtype,
            self.device,
            engine_profile("native", place, hardware.host),
        )
        self._variant = reference
        torch_dtype: torch.dtype = getattr(torch, dtype)
        self._states = torch.empty(size, dtype=torch_dtype, device=self.device)
        """Before each layer, and after the last: there their gradients, going back."""
        half = spec.attention[0].key_head_dim // 2
        self._rotary = torch.empty(2, context, half, device=self.device)
        fill_rotary(self._rotary, forward.rope, 2 * half)
        self._costs: dict[str, float] = {}
        self._done = 0

    def forwards(self) -> None:
        """Hidden states before every layer."""
        self._read(0)
        table = self._weights.plain(0, Role.EMBEDDING)
        self._states[0] = table[self._inputs] * self._forward.embedding_multiplier
        for layer in range(self._spec.num_hidden_layers):
            tensors = self._layer(layer)
            for number in range(len(self._inputs)):
                with torch.no_grad():
                    states = self._run(layer, tensors, self._states[layer, number], _nothing)
                self._states[layer + 1, number] = states

    def begin(self) -> None:
        """Gradients of the hidden states that leave the last layer, in their place."""
        spec, last = self._spec, self._spec.num_hidden_layers + 1
        self._read(last)
        norm = self._weights.plain(last, Role.NORM).clone()
        if spec.tie_word_embeddings:
            self._read(0)
            head = self._weights.plain(0, Role.EMBEDDING)
        else:
            head = self._weights.plain(last, Role.HEAD)
        step = max(1, LOGITS_BYTES // (4 * spec.vocab_size))
        generator = torch.Generator().manual_seed(_SEED)
        for window in self._states[spec.num_hidden_layers]:
            for first in range(0, len(window), step):
                rows = window[first : first + step]
                with torch.enable_grad():
                    states = rows.detach().clone().requires_grad_()
                    normed = rms_norm(states, norm, self._forward.rms_norm_eps)
                divisor = self._forward.logits_divisor
                logits = torch.mm(normed.detach(), head.t()).float().div_(divisor)
                noise = fisher_noise(logits, generator).to(rows.dtype)
                (gradient,) = torch.autograd.grad(
                    normed, states, torch.mm(noise, head).div_(divisor)
                )
                rows.copy_(gradient)

    def back(self) -> dict[str, float]:
        """Every layer with gradients, the last first; sensitivities."""
        tokens = self._inputs.numel()
        found = dict.fromkeys(groups_of(self._spec, frozenset({Role.LINEAR})), 0.0)
        gradients = self._states[self._spec.num_hidden_layers]
        for layer in reversed(range(self._spec.num_hidden_layers)):
            tensors = self._layer(layer)
            costs: dict[str, torch.Tensor] = {}

            def add(name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
                cost = weight_cost(tensors[f"{name}.weight"], x, gradient)  # noqa: B023
                costs[name] = costs.get(name, 0) + cost.double()  # noqa: B023

            for number, states in enumerate(self._states[layer]):
                with torch.enable_grad():
                    before = states.detach().clone().requires_grad_()
                    after = self._run(layer, tensors, before, add)
                (gradient,) = torch.autograd.grad(after, before, gradients[number])
                gradients[number].copy_(gradient)
            for tensor in (t for t in self._spec.tensors if t.layer == layer):
                cost = costs.get(name_in_layer(tensor).removesuffix(".weight"))
                if cost is not None:
                    found[group_of(tensor)] += float(cost) / tokens
        return found

    def _layer(self, layer: int) -> Mapping[str, torch.Tensor]:
        self._read(layer + 1)
        return self._weights.tensors(layer + 1, self._variant)

    def _run(
        self,
        layer: int,
        tensors: Mapping[str, torch.Tensor],
        states: torch.Tensor,
        sink: Callable[[str, torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        return decoder_layer(
            tensors, states, self._rotary, self._forward, self._spec.attention[layer], sink
        )

    def _read(self, unit: int) -> None:
        self._weights.read(unit)
        self._done += self._weights.unit_bytes[unit]
        if self._told is not None:
            # The embedding and the head are read once, or, where they are one, twice.
            total = 2 * sum(self._weights.unit_bytes)
            self._told(min(self._done, total), total)


def _layer_bytes(spec: ModelSpec, context: int) -> int:
    """What a layer's activations and gradients of one window take, in float32."""
    heads = spec.num_attention_heads * spec.attention[0].key_head_dim
    numbers = 8 * spec.hidden_size + 8 * heads + 8 * spec.intermediate_size
    scores = 3 * context * spec.num_attention_heads
    return 4 * context * (numbers + scores + 4 * context)


def _nothing(_name: str, _x: torch.Tensor, _gradient: torch.Tensor) -> None:
    raise AssertionError("nothing travels back")
