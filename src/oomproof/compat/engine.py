"""transformers' model behind the engine interface: static caches, chunked prefill, our sampling.

Each concurrent request owns a slot with a StaticCache of the planned context, allocated at load;
slots take turns, one token each. It knows nothing of text.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from transformers import StaticCache

from oomproof.compat.measure import MemoryMeter
from oomproof.engine.admission import check_request
from oomproof.engine.messages import Event, FinishedEvent, FinishReason, Request, TokenEvent
from oomproof.engine.sampling import RequestSampler
from oomproof.loading.devices import release_devices
from oomproof.memory.kv_cache import KV_FORMATS, planned_tokens
from oomproof.memory.terms import DeviceTerms
from oomproof.models.spec import AttentionSpec, ModelSpec
from oomproof.planning.plan import Plan


@dataclass(slots=True)
class _Active:
    """A request in its slot."""

    request: Request
    cache: Any
    sampler: RequestSampler
    position: int = 0
    """Tokens already in the cache."""
    pending: tuple[int, ...] = ()
    """Tokens to process next: what is left of the prompt, or the last token drawn."""
    new_tokens: int = 0


class TransformersEngine:
    """Runs requests on a loaded transformers model; implements `engine.protocol.Engine`.

    Args:
        model: What `compat.model.load_model` returned.
        plan: The plan it was loaded by.
        spec: The model's shapes.
        meter: Measures the devices since before the model was loaded.
    """

    def __init__(self, model: Any, plan: Plan, spec: ModelSpec, meter: MemoryMeter) -> None:
        self.model = model
        self._plan = plan
        self._meter = meter
        self._input_device = model.get_input_embeddings().weight.device
        head = model.get_output_embeddings()
        self._logits_device = (head or model.get_input_embeddings()).weight.device
        meter.weights_loaded(model)
        pools, caches = allocate_caches(model, plan, spec)
        self._free_caches: deque[Any] = deque(caches)
        meter.cache_allocated(pools)
        self._waiting: deque[Request] = deque()
        self._active: list[_Active] = []
        self._cancelled: set[str] = set()

    @property
    def idle(self) -> bool:
        """Whether no request is queued or active."""
        return not self._waiting and not self._active

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: Prompt and answer can never fit in the planned context.
        """
        vocab_size = self.model.config.get_text_config().vocab_size
        check_request(
            request,
            context=self._plan.context,
            vocab_size=vocab_size,
            max_context=self._plan.max_context,
        )
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step; unknown ids are ignored."""
        self._cancelled.add(request_id)

    def step(self) -> Sequence[Event]:
        """Advances every active request by a prefill chunk or a token."""
        events: list[Event] = list(self._drop_cancelled())
        while self._waiting and self._free_caches:
            self._admit(self._waiting.popleft())
        for active in tuple(self._active):
            events += self._advance(active)
        self._meter.sample()
        return events

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        """Device index → bytes measured so far."""
        return self._meter.terms()

    def close(self) -> None:
        """Gives the model's memory back."""
        self._meter.release()
        self._active.clear()
        self._waiting.clear()
        self._free_caches.clear()
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        release_devices(self._plan)

    def _drop_cancelled(self) -> Iterator[FinishedEvent]:
        for active in tuple(self._active):
            if active.request.id in self._cancelled:
                yield self._finish(active, "cancelled")
        for request in tuple(self._waiting):
            if request.id in self._cancelled:
                self._waiting.remove(request)
                yield _finished(request, "cancelled", new_tokens=0)
        self._cancelled.clear()

    def _admit(self, request: Request) -> None:
        cache = self._free_caches.popleft()
        cache.reset()
        self._active.append(
            _Active(
                request=request,
                cache=cache,
                sampler=RequestSampler(
                    request.sampling,
                    self._logits_device,
                    request.prompt_tokens,
                    request.resumed_tokens,
                ),
                pending=request.prompt_tokens,
            )
        )

    def _advance(self, active: _Active) -> list[Event]:
        chunk = self._plan.prefill_chunk_tokens
        tokens, rest = active.pending[:chunk], active.pending[chunk:]
        logits = self._forward(active, tokens)
        active.pending = rest
        if rest:
            return []
        drawn = active.sampler.draw(logits)
        token = drawn.token
        request = active.request
        if token in request.stop_tokens:
            return [self._finish(active, "stop")]
        active.new_tokens += 1
        active.pending = (token,)
        events: list[Event] = [
            TokenEvent(
                request_id=request.id,
                token=token,
                logprob=drawn.logprob,
                top_logprobs=drawn.top_logprobs,
            )
        ]
        if active.new_tokens == request.max_new_tokens:
            events.append(self._finish(active, "length"))
        return events

    @torch.inference_mode()
    def _forward(self, active: _Active, tokens: tuple[int, ...]) -> torch.Tensor:
        """Processes tokens at the request's position; logits [vocab] of the last one."""
        start, end = active.position, active.position + len(tokens)
        device = self._input_device
        output = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.arange(start, end, device=device).unsqueeze(0),
            past_key_values=active.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        active.position = end
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _finish(self, active: _Active, reason: FinishReason) -> FinishedEvent:
        self._active.remove(active)
        self._free_caches.append(active.cache)
        return _finished(active.request, reason, new_tokens=active.new_tokens)


def _finished(request: Request, reason: FinishReason, *, new_tokens: int) -> FinishedEvent:
    return FinishedEvent(
        request_id=request.id,
        reason=reason,
        prompt_tokens=len(request.prompt_tokens),
        new_tokens=new_tokens,
    )


def allocate_caches(
    model: Any, plan: Plan, spec: ModelSpec
) -> tuple[list[torch.Tensor], list[Any]]:
    """A StaticCache for each concurrent request, carved from one pool a device.

    One allocation a device wastes nothing; a tensor for each layer would, by the rounding of
    torch's allocator (0.4 GiB of 2 for four requests on an 8B model).

    Returns:
        The pools, and the caches whose layers are views of them.
    """
    dtype = getattr(torch, KV_FORMATS[plan.kv_format])
    devices = [next(layer.parameters()).device for layer in model.get_decoder().layers]
    caches = [
        StaticCache(config=model.config, max_cache_len=planned_tokens(plan.context))
        for _ in range(plan.concurrency)
    ]
    sizes = dict.fromkeys(devices, 0)
    for cache in caches:
        for layer, attention, device in zip(cache.layers, spec.attention, devices, strict=True):
            sizes[device] += sum(prod(shape) for shape in _cache_shapes(layer, attention))
    pools = {d: torch.zeros(size, dtype=dtype, device=d) for d, size in sizes.items()}
    free = dict(pools)
    for cache in caches:
        for layer, attention, device in zip(cache.layers, spec.attention, devices, strict=True):
            keys, values = _cache_shapes(layer, attention)
            parts = free[device].split(
                [prod(keys), prod(values), free[device].numel() - prod(keys) - prod(values)]
            )
            free[device] = parts[2]
            _initialise(layer, parts[0].view(keys), parts[1].view(values))
    return list(pools.values()), caches


_CacheShape = tuple[int, int, int, int]


def _cache_shapes(layer: Any, attention: AttentionSpec) -> tuple[_CacheShape, _CacheShape]:
    """Shapes of a layer's keys and values: [1, kv heads, tokens, head dim]."""
    heads, tokens = attention.num_key_value_heads, layer.max_cache_len
    return (
        (1, heads, tokens, attention.key_head_dim),
        (1, heads, tokens, attention.value_head_dim),
    )


def _initialise(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Gives a StaticLayer its tensors; its own initialisation allocates none of zero length."""
    tokens, layer.max_cache_len = layer.max_cache_len, 0
    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    layer.max_cache_len = tokens
    layer.keys, layer.values = keys, values
