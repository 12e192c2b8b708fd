"""Drawing the tokens of every active request at once, on the device, in memory it is given.

What is drawn is defined by `engine.sampling`, which is also what runs on a CPU. A row of logits is
one request's next position; its slot says whose options, counts and random state it uses. All
decisions are made from device data, so one captured CUDA graph serves any mix of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from oomproof.engine.messages import SamplingOptions
from oomproof.engine.sampling import PROMPT_FLAG, Settings, draw, without_nan
from oomproof.memory.sampler import STAGED_TOKENS, sampler_buffers
from oomproof.quantization.library import operator

Take = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
"""Hands out a view of the engine's arena: (name, shape, dtype)."""

# Columns of a slot's float32 options.
INVERSE_TEMPERATURE, TOP_P, REACH, REPETITION, INVERSE_REPETITION, PRESENCE, FREQUENCY = range(7)
# Columns of a slot's int64 options; DRAWS counts the tokens drawn, LIMIT belongs to the kernels.
SEED, TOP_K, ALTERNATIVES, HAS_PENALTIES, DRAWS, LIMIT = range(6)
_STATE = (
    "float_options",
    "integer_options",
    "counts",
    "group_best",
    "group_list",
    "candidates",
    "chunk_values",
    "chunk_tokens",
    "logprobs",
    "top_tokens",
    "top_logprobs",
)
"""Buffers that `sample` takes, in its order."""


class Sampler:
    """The sampling state of every request that an engine can serve at once.

    Args:
        slots: Requests at once.
        vocab_size: Entries of a row of logits.
        device: Where the logits are.
        take: Called once for each of `memory.sampler.sampler_buffers`; nothing else is allocated
            on the device.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device, take: Take) -> None:
        buffers = {
            name: take(name, shape, getattr(torch, dtype))
            for name, shape, dtype in sampler_buffers(slots, vocab_size)
        }
        self.logprobs = buffers["logprobs"]
        """float32 [slots]: of the token drawn last in each row, in the model's own distribution."""
        self.top_tokens = buffers["top_tokens"]
        """int32 [slots, 20]: of each row, the most likely tokens, as many as were asked for; -1
        where the rest is impossible."""
        self.top_logprobs = buffers["top_logprobs"]
        """float32 [slots, 20]: their log-probabilities."""
        self._counts = buffers["counts"]
        self._staged_tokens = buffers["staged_tokens"]
        self._state = tuple(buffers[name] for name in _STATE)
        self._chunks = (buffers["chunk_values"], buffers["chunk_tokens"])
        self._staging = _Staging(
            buffers["float_options"], buffers["integer_options"], self._staged_tokens, device
        )

    def admit(
        self,
        slot: int,
        options: SamplingOptions,
        seed: int | None,
        prompt_tokens: Sequence[int],
        resumed_tokens: int = 0,
    ) -> None:
        """Gives a slot to a request; whatever was there is forgotten.

        Enqueued on the current stream. It is called between steps, outside a captured graph.

        Args:
            slot: Which one.
            options: The request's; its seed is not looked at.
            seed: From 0 to 2^63 - 1; None draws a fresh one.
            prompt_tokens: The request's prompt, within the vocabulary; read where there is a
                repetition penalty.
            resumed_tokens: So many of its last ones are the answer's, drawn before: they are
                counted, and draws are numbered after them.
        """
        settings = Settings.of(options, seed)
        self._staging.write_options(slot, settings, resumed_tokens)
        if not settings.has_penalties:
            return
        row = self._counts[slot].zero_()
        prompt = len(prompt_tokens) - resumed_tokens
        if settings.repetition != 1:
            for chunk in _chunks(prompt_tokens[:prompt]):
                self._staging.write_tokens(chunk)
                flag_prompt(self._staged_tokens, len(chunk), row)
        for chunk in _chunks(prompt_tokens[prompt:]):
            self._staging.write_tokens(chunk)
            count_answer(self._staged_tokens, len(chunk), row)

    def sample(self, logits: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Draws the next token of each row.

        `logprobs`, `top_tokens` and `top_logprobs` are written for rows that ask for them; counts
        and random states of the rows' slots move on.

        Args:
            logits: float32 [rows, vocab], rows being at most the slots.
            slots: int32 [rows], each at most once; -1 leaves the row out.
            tokens: int64 [rows], written.
        """
        sample(logits, slots, tokens, *self._state)

    def sample_greedy(
        self, logits: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """The largest logit's token of each row, for when every request is a plain argmax.

        That is `SamplingOptions.is_plain_argmax`. Nothing but the tokens is written.

        Args:
            logits: float32 [rows, vocab], rows being at most the slots.
            slots: int32 [rows]; -1 leaves the row out.
            tokens: int64 [rows], written.
        """
        sample_greedy(logits, slots, tokens, *self._chunks)


def _chunks(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    """Tokens in the pieces that are staged at once."""
    return (tokens[start : start + STAGED_TOKENS] for start in range(0, len(tokens), STAGED_TOKENS))


class _Staging:
    """Pinned host memory through which a request's options and prompt reach a GPU.

    A copy does not wait for the GPU; a region is written again only once its last copy is done.
    """

    def __init__(
        self,
        floats: torch.Tensor,
        integers: torch.Tensor,
        tokens: torch.Tensor,
        device: torch.device,
    ) -> None:
        self._device_floats, self._device_integers, self._device_tokens = floats, integers, tokens
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._floats = self._host(floats)
        self._integers = self._host(integers)
        self._tokens = self._host(tokens)
        slots = floats.shape[0]
        self._slot_copied = [torch.cuda.Event() for _ in range(slots)] if self._is_cuda else []
        self._tokens_copied = torch.cuda.Event() if self._is_cuda else None

    def _host(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(like.shape, dtype=like.dtype, pin_memory=self._is_cuda)

    def write_options(self, slot: int, settings: Settings, draws: int) -> None:
        """Sends a slot's options, and how many tokens were drawn already."""
        if self._is_cuda:
            self._slot_copied[slot].synchronize()
        floats, integers = self._floats[slot], self._integers[slot]
        floats[INVERSE_TEMPERATURE] = settings.inverse_temperature
        floats[TOP_P] = settings.top_p
        floats[REACH] = settings.reach
        floats[REPETITION] = settings.repetition
        floats[INVERSE_REPETITION] = settings.inverse_repetition
        floats[PRESENCE] = settings.presence
        floats[FREQUENCY] = settings.frequency
        integers[SEED] = settings.seed
        integers[TOP_K] = settings.top_k
        integers[ALTERNATIVES] = settings.alternatives
        integers[HAS_PENALTIES] = settings.has_penalties
        integers[DRAWS] = draws
        self._device_floats[slot].copy_(floats, non_blocking=True)
        self._device_integers[slot].copy_(integers, non_blocking=True)
        if self._is_cuda:
            self._slot_copied[slot].record(torch.cuda.current_stream(self._device))

    def write_tokens(self, tokens: Sequence[int]) -> None:
        """Sends a chunk of a prompt."""
        if self._tokens_copied is not None:
            self._tokens_copied.synchronize()
        count = len(tokens)
        self._tokens[:count] = torch.tensor(tokens, dtype=torch.int32)
        self._device_tokens[:count].copy_(self._tokens[:count], non_blocking=True)
        if self._tokens_copied is not None:
            self._tokens_copied.record(torch.cuda.current_stream(self._device))


@operator("oomproof::sample", mutates_args=("tokens", *_STATE[1:]))
def sample(  # noqa: PLR0913, PLR0917 - every tensor that a kernel may touch is named
    logits: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    float_options: torch.Tensor,
    integer_options: torch.Tensor,
    counts: torch.Tensor,
    group_best: torch.Tensor,  # noqa: ARG001 - scratch of the kernels
    group_list: torch.Tensor,  # noqa: ARG001
    candidates: torch.Tensor,  # noqa: ARG001
    chunk_values: torch.Tensor,  # noqa: ARG001
    chunk_tokens: torch.Tensor,  # noqa: ARG001
    logprobs: torch.Tensor,
    top_tokens: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """Draws the next token of each row; see `Sampler.sample` and `sampler_buffers`."""
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        integers = integer_options[slot]
        settings = _settings(float_options[slot].tolist(), integers.tolist())
        seen = counts[slot] if settings.has_penalties else None
        drawn = draw(logits[row], seen, settings, int(integers[DRAWS]))
        tokens[row] = drawn.token
        integers[DRAWS] += 1
        if seen is not None:
            seen[drawn.token] += 1
        if drawn.logprob is not None:
            logprobs[row] = drawn.logprob
            top_tokens[row, : settings.alternatives] = -1
            top_logprobs[row, : settings.alternatives] = -torch.inf
            for rank, (token, logprob) in enumerate(drawn.top_logprobs):
                top_tokens[row, rank], top_logprobs[row, rank] = token, logprob


@sample.register_kernel("cuda")
def _(*tensors: torch.Tensor) -> None:
    from oomproof.engine.native import sampler_triton

    # Triton launches on the current device, which need not be that of the logits.
    with torch.cuda.device(tensors[0].device):
        sampler_triton.sample(*tensors)


def _settings(floats: Sequence[float], integers: Sequence[int]) -> Settings:
    return Settings(
        inverse_temperature=floats[INVERSE_TEMPERATURE],
        top_p=floats[TOP_P],
        reach=floats[REACH],
        repetition=floats[REPETITION],
        inverse_repetition=floats[INVERSE_REPETITION],
        presence=floats[PRESENCE],
        frequency=floats[FREQUENCY],
        top_k=integers[TOP_K],
        alternatives=integers[ALTERNATIVES],
        seed=integers[SEED],
    )


@operator("oomproof::sample_greedy", mutates_args=("tokens", "chunk_values", "chunk_tokens"))
def sample_greedy(
    logits: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    chunk_values: torch.Tensor,  # noqa: ARG001 - scratch of the kernels
    chunk_tokens: torch.Tensor,  # noqa: ARG001
) -> None:
    """The largest logit's token of each row, the first of equals; see `Sampler.sample_greedy`."""
    torch.where(slots >= 0, without_nan(logits).argmax(dim=-1), tokens, out=tokens)


@sample_greedy.register_kernel("cuda")
def _(*tensors: torch.Tensor) -> None:
    from oomproof.engine.native import sampler_triton

    with torch.cuda.device(tensors[0].device):
        sampler_triton.sample_greedy(*tensors)


@operator("oomproof::flag_prompt", mutates_args=("counts",))
def flag_prompt(tokens: torch.Tensor, count: int, counts: torch.Tensor) -> None:
    """Flags a prompt's tokens in the counts of its slot.

    Args:
        tokens: int32, the first `count` of them within the vocabulary.
        count: How many.
        counts: int32 [vocab].
    """
    counts[tokens[:count].long()] = PROMPT_FLAG


@flag_prompt.register_kernel("cuda")
def _(tokens: torch.Tensor, count: int, counts: torch.Tensor) -> None:
    from oomproof.engine.native import sampler_triton

    with torch.cuda.device(counts.device):
        sampler_triton.flag_prompt(tokens, count, counts)


@operator("oomproof::count_answer", mutates_args=("counts",))
def count_answer(tokens: torch.Tensor, count: int, counts: torch.Tensor) -> None:
    """Counts an answer's tokens, drawn before, in the counts of its slot.

    Args:
        tokens: int32, the first `count` of them within the vocabulary.
        count: How many.
        counts: int32 [vocab].
    """
    ones = torch.ones(count, dtype=counts.dtype, device=counts.device)
    counts.index_add_(0, tokens[:count].long(), ones)


@count_answer.register_kernel("cuda")
def _(tokens: torch.Tensor, count: int, counts: torch.Tensor) -> None:
    from oomproof.engine.native import sampler_triton

    with torch.cuda.device(counts.device):
        sampler_triton.count_answer(tokens, count, counts)


for _operator in (sample, sample_greedy, flag_prompt, count_answer):
    _operator.register_fake(lambda *_arguments: None)
