"""A loaded model as people use it: text in, text out, streamed; it wraps any engine."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Protocol, Self, TypeVar, cast

from pydantic import Field

from oomproof.engine.messages import (
    REPETITION_PENALTIES,
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    SamplingOptions,
    TokenScore,
)
from oomproof.engine.protocol import Engine, HasPlan, Scores
from oomproof.engine.text import IncrementalDecoder, StopScanner, read_stops
from oomproof.errors import NotRunnableError, RequestError
from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import Plan

DEFAULT_MAX_NEW_TOKENS = 512
"""Bound of an answer where none is asked for; less where the context has less room."""

Message = Mapping[str, str]
"""A turn of a conversation: {"role": "user", "content": "…"}."""
Prompt = str | Sequence[Message]
"""A user's message, or a whole conversation."""
Tokens = Sequence[int]
"""A prompt as it is, without a template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What a model's own generation_config.json sets; an option of a request goes first."""

    eos_token_id: int | tuple[int, ...] | None = None
    """Tokens that end an answer."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: (
        Annotated[float, Field(ge=REPETITION_PENALTIES[0], le=REPETITION_PENALTIES[1])] | None
    ) = None

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer, as a set."""
        if self.eos_token_id is None:
            return frozenset()
        return frozenset(
            (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one token of an answer, in the model's own distribution.

    That is the log-softmax of its logits, before penalties, temperature and filters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, log-probability) of the most likely ones, best first."""


class Tokenizer(Protocol):
    """What a model's text side needs."""

    has_chat_template: bool
    stop_tokens: frozenset[int]

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of plain text."""

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a conversation, up to where the answer begins."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""


T = TypeVar("T")


def _first(asked: T | None, configured: T | None, otherwise: T) -> T:
    if asked is not None:
        return asked
    return otherwise if configured is None else configured


class Stream(Iterator[str]):
    """An answer on its way: iterate for its pieces of text.

    Streams of one model may be read in turns; reading one advances them all.
    """

    def __init__(self, model: Model, request: Request, stops: Sequence[str] = ()) -> None:
        self._model = model
        self._request = request
        self._decoder = IncrementalDecoder(model.tokenizer.decode)
        self._scanner = StopScanner(stops)
        self._pieces: deque[str] = deque()
        self._started = time.perf_counter()
        self.text = ""
        """The answer so far."""
        self.tokens: list[int] = []
        """The answer's tokens so far; those of a stop string are among them."""
        self.logprobs: list[TokenLogprobs] = []
        """Of each of these tokens, where they were asked for."""
        self.finish_reason: FinishReason | None = None
        """Why the answer ended, None while it goes on."""
        self.first_token_s: float | None = None
        """Seconds from the request to its first token."""
        self.finished_s: float | None = None
        """Seconds from the request to its end."""

    def __next__(self) -> str:
        while not self._pieces:
            if self.finish_reason is not None:
                raise StopIteration
            self._model.advance()
        return self._pieces.popleft()

    def cancel(self) -> None:
        """Ends the answer where it is; what was produced stays in `text`."""
        if self.finish_reason is None:
            self._model.cancel(self._request.id)

    def receive(self, event: Event) -> None:
        """Takes an event of this request from the engine."""
        if isinstance(event, FinishedEvent):
            self._add(self._scanner.push(self._decoder.flush()) + self._scanner.flush())
            self.finish_reason = "stop" if self.is_cut else event.reason
            self.finished_s = time.perf_counter() - self._started
        elif not self.is_cut:
            if self.first_token_s is None:
                self.first_token_s = time.perf_counter() - self._started
            self.tokens.append(event.token)
            if event.logprob is not None:
                self.logprobs.append(
                    TokenLogprobs(token=event.token, logprob=event.logprob, top=event.top_logprobs)
                )
            self._add(self._scanner.push(self._decoder.push(event.token)))

    @property
    def is_cut(self) -> bool:
        """Whether a stop string came: the answer ended before it."""
        return self._scanner.found

    def _add(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._pieces.append(piece)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self._request.prompt_tokens)

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed: tokens after the first one over the time they took."""
        if self.finished_s is None or self.first_token_s is None or len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / (self.finished_s - self.first_token_s)


class Model:
    """A loaded model. Close it, or use it in a `with` block, to give its memory back.

    Args:
        engine: Runs the requests.
        tokenizer: The model's text side.
        plan: The plan it was loaded by.
        defaults: The model's own sampling options.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        plan: Plan,
        defaults: GenerationDefaults | None = None,
    ) -> None:
        self._defaults = defaults or GenerationDefaults()
        self._engine = engine
        self._streams: dict[str, Stream] = {}
        self._ids = itertools.count()
        self.tokenizer = tokenizer
        self._plan = plan

    @property
    def plan(self) -> Plan:
        """The plan that the model runs by: another one after a rung that changed it."""
        return self._engine.plan if isinstance(self._engine, HasPlan) else self._plan

    def stream(  # noqa: PLR0913 - one keyword an option of the command line
        self,
        prompt: Prompt | Tokens,
        *,
        raw: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
    ) -> Stream:
        """Begins an answer.

        Args:
            prompt: A user's message, the turns of a conversation, or tokens.
            raw: Continue the text as it stands, without the model's chat template.
            max_new_tokens: Bound of the answer; None for 512, or what the context has room for.
            temperature: 0 takes the most likely token each time; None for the model's own, or 1.
            top_k: Keep this many of the most likely tokens; 0 keeps all; None for the model's own.
            top_p: Keep the most likely tokens that hold this probability together; None for the
                model's own, or 1.
            min_p: Keep tokens at least this many times as likely as the most likely one; None for
                the model's own, or 0.
            repetition_penalty: Above 1 makes tokens of prompt and answer less likely; None for the
                model's own, or 1.
            presence_penalty: Above 0 makes tokens of the answer less likely.
            frequency_penalty: Above 0 makes them the less likely the more often they came.
            seed: Makes the answer repeatable.
            stop: The answer ends before the first of these strings.
            logprobs: Gives `Stream.logprobs`, with this many of the most likely tokens each.

        Raises:
            RequestError: An option out of bounds, or a prompt that cannot fit.
        """
        stops = read_stops(stop)
        tokens = self._encode(prompt, raw=raw)
        if max_new_tokens is None:
            room = self.plan.context - len(tokens)
            max_new_tokens = max(1, min(DEFAULT_MAX_NEW_TOKENS, room))
        request = Request(
            id=str(next(self._ids)),
            prompt_tokens=tokens,
            max_new_tokens=max_new_tokens,
            sampling=SamplingOptions(
                temperature=_first(temperature, self._defaults.temperature, 1.0),
                top_k=_first(top_k, self._defaults.top_k, 0),
                top_p=_first(top_p, self._defaults.top_p, 1.0),
                min_p=_first(min_p, self._defaults.min_p, 0.0),
                repetition_penalty=_first(
                    repetition_penalty, self._defaults.repetition_penalty, 1.0
                ),
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                seed=seed,
                logprobs=logprobs,
            ),
            stop_tokens=self.tokenizer.stop_tokens,
        )
        self._engine.submit(request)
        stream = Stream(self, request, stops)
        self._streams[request.id] = stream
        return stream

    def generate(self, prompt: Prompt, **options: Any) -> str:
        """The whole answer to a prompt.

        Args:
            prompt: A user's message, or the turns of a conversation.
            options: Those of `stream`.

        Raises:
            RequestError: An option out of bounds, or a prompt that cannot fit.
        """
        return "".join(self.stream(prompt, **options))

    def generate_all(self, prompts: Iterable[Prompt], **options: Any) -> list[str]:
        """The answers to several prompts, as many at once as the plan's concurrency.

        Args:
            prompts: Each as for `generate`.
            options: Those of `stream`, for all of them.

        Raises:
            RequestError: An option out of bounds, or a prompt that cannot fit.
        """
        streams: list[Stream] = []
        try:
            streams += (self.stream(prompt, **options) for prompt in prompts)
        except RequestError:
            for stream in streams:
                stream.cancel()
            raise
        return ["".join(stream) for stream in streams]

    def score(self, tokens: Sequence[int], first: int = 1) -> Sequence[TokenScore]:
        """How likely tokens of a text are, each after all before it; no answer may be on its way.

        Args:
            tokens: At least two.
            first: Index of the first to score, at least 1.

        Raises:
            RequestError: The tokens do not fit in the planned context, or are too few.
            NotRunnableError: The engine does not tell.
        """
        if not 1 <= first < len(tokens):
            raise RequestError(
                f"token {first} of {len(tokens)} cannot be scored: it is from 1 to the last, "
                "after at least one other"
            )
        if self._streams:
            raise RequestError(
                f"{len(self._streams)} answers are on their way", remedy="read them to their end"
            )
        if not isinstance(self._engine, Scores):
            raise NotRunnableError(
                "this engine does not tell how likely given tokens are",
                remedy="load with worker=False and the native engine",
            )
        return self._engine.score(tokens, first)

    def advance(self) -> None:
        """One step of the engine; its events go to their streams."""
        for event in self._engine.step():
            stream = self._streams[event.request_id]
            stream.receive(event)
            if isinstance(event, FinishedEvent):
                del self._streams[event.request_id]
            elif stream.is_cut:
                self._engine.cancel(event.request_id)

    def cancel(self, request_id: str) -> None:
        """Ends a request; its stream finishes at the next step."""
        self._engine.cancel(request_id)
        self.advance()

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        """Device index → bytes measured so far, under the names of the plan's terms."""
        return self._engine.measured_terms()

    def close(self) -> None:
        """Gives the model's memory back."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt | Tokens, *, raw: bool) -> tuple[int, ...]:
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], int):
            return tuple(cast("Tokens", prompt))
        prompt = cast("Prompt", prompt)
        if raw or not self.tokenizer.has_chat_template:
            if isinstance(prompt, str):
                return self.tokenizer.encode(prompt)
            why = "it is asked for raw" if raw else "this model has no chat template"
            raise RequestError(
                f"a conversation needs a chat template, and {why}",
                remedy="give the prompt as one text",
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.encode_chat(messages)
