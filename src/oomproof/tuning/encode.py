"""A sample → its tokens, and which of them are learned.

Prompt and completion are tokenised together where the prompt's tokens stay what they are alone, as
they are when the model answers; else apart. A document and a completion end with the tokenizer's
end-of-sequence token; a conversation ends as the model's chat template ends it, and what the
template writes behind an answer (its end-of-turn token) is learned with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from oomproof.errors import RequestError
from oomproof.tuning.records import Completion, Conversation, DataError, Page, Record


class TrainingTokenizer(Protocol):
    """What is needed of a tokenizer; `compat.tokenizer.TransformersTokenizer` has it."""

    eos_token_id: int | None
    chat_template: str | None

    @property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens that begin a document."""

    def encode_bare(self, text: str) -> list[int]:
        """Tokens of plain text."""

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The same, and the character where each ends."""

    def render_turns(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        begins_answer: bool = False,
    ) -> str:
        """Turns as the chat template writes them."""

    def encode_generated(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[bool]] | None:
        """Tokens, and which the template marks as generated; None where it marks nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Tokens of one sample."""

    line: int
    tokens: Sequence[int]
    learned: Sequence[bool]
    """Whether the loss counts a token; one for each."""


class SampleEncoder:
    """Encodes the records of one file, in their order.

    Args:
        tokenizer: The model's.
        context: Tokens of a sequence; plain text is cut into sequences of as many.
        name: What errors call the file.
    """

    def __init__(self, tokenizer: TrainingTokenizer, *, context: int, name: str) -> None:
        self._tokenizer, self._context, self._name = tokenizer, context, name
        self._prefix = list(tokenizer.prefix)
        eos = tokenizer.eos_token_id
        self._end = [] if eos is None else [eos]
        self._rest: list[int] = []
        """Tokens of plain text that fill no sequence yet."""
        self._rest_line = 1

    def encode(self, record: Record) -> Iterator[Sample]:
        """The samples of one record: one, or of plain text as many as are full.

        Raises:
            DataError: It has no tokens to learn, or the chat template does not take it.
        """
        if isinstance(record, Page):
            yield from self._page(record)
            return
        if isinstance(record, Conversation):
            sample = self._conversation(record)
        elif isinstance(record, Completion):
            sample = self._completion(record)
        else:
            tokens = self._prefix + self._tokenizer.encode_bare(record.text) + self._end
            learned = [False] * len(self._prefix) + [True] * (len(tokens) - len(self._prefix))
            sample = Sample(line=record.line, tokens=tokens, learned=learned)
        # The first token of a sequence is predicted from nothing, so it is never learned.
        if not any(sample.learned[1:]):
            raise DataError(
                self._name, record.line, "has no token to learn", remedy="remove the line"
            )
        yield sample

    def finish(self) -> Iterator[Sample]:
        """What is left of plain text."""
        if self._rest:
            yield from self._cut(self._rest + self._end)
            self._rest = []

    def _page(self, record: Page) -> Iterator[Sample]:
        if not self._rest:
            self._rest_line = record.line
        self._rest += self._tokenizer.encode_bare(record.text)
        room = self._context - len(self._prefix)
        full = len(self._rest) // room * room
        yield from self._cut(self._rest[:full])
        self._rest = self._rest[full:]
        if full:
            self._rest_line = record.line

    def _cut(self, tokens: list[int]) -> Iterator[Sample]:
        room = self._context - len(self._prefix)
        for first in range(0, len(tokens), room):
            part = tokens[first : first + room]
            if len(self._prefix) + len(part) < 2:
                continue  # one token alone is predicted from nothing
            yield Sample(
                line=self._rest_line,
                tokens=self._prefix + part,
                learned=[False] * len(self._prefix) + [True] * len(part),
            )

    def _completion(self, record: Completion) -> Sample:
        prompt = self._prefix + self._tokenizer.encode_bare(record.prompt)
        both = self._prefix + self._tokenizer.encode_bare(record.prompt + record.completion)
        if both[: len(prompt)] != prompt:
            both = prompt + self._tokenizer.encode_bare(record.completion)
        learned = [False] * len(prompt) + [True] * (len(both) - len(prompt) + len(self._end))
        return Sample(line=record.line, tokens=both + self._end, learned=learned)

    def _conversation(self, record: Conversation) -> Sample:
        if self._tokenizer.chat_template is None:
            raise DataError(
                self._name,
                record.line,
                "has messages, and this model has no chat template",
                remedy="use a model that has one, or prompt and completion",
            )
        try:
            marked = self._tokenizer.encode_generated(record.messages, tools=record.tools)
            if marked is not None and any(marked[1]):
                return Sample(line=record.line, tokens=marked[0], learned=marked[1])
            return self._by_prefixes(record)
        except RequestError as error:
            raise DataError(self._name, record.line, error.message, remedy=error.remedy) from None

    def _by_prefixes(self, record: Conversation) -> Sample:
        """What the assistant says is what each of its turns adds to the text before it."""
        render, messages = self._tokenizer.render_turns, record.messages
        whole = render(messages, tools=record.tools)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render(messages[:number], tools=record.tools, begins_answer=True)
            upto = render(messages[: number + 1], tools=record.tools)
            if not (upto.startswith(before) and whole.startswith(upto)):
                raise DataError(
                    self._name,
                    record.line,
                    f"message {number + 1}: the chat template writes it in another way once more "
                    "turns follow, so it cannot be told what is learned",
                    remedy="write one line for each answer, with the turns before it",
                )
            spans.append((len(before), len(upto)))
        tokens, ends = self._tokenizer.encode_with_ends(whole)
        learned = [False] * len(tokens)
        for begin, end in spans:
            last = 0
            for place, at in enumerate(ends):
                if last < begin < at:
                    raise DataError(
                        self._name,
                        record.line,
                        "a token reaches from a question into its answer",
                        remedy="this model's chat template does not keep them apart: use prompt "
                        "and completion",
                    )
                learned[place] = learned[place] or begin < at <= end
                last = at
        return Sample(line=record.line, tokens=tokens, learned=learned)
