"""What is learned of a sample: answers, completions, texts; and no token of what was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from oomproof.compat.tokenizer import TransformersTokenizer, read_generation_defaults
from oomproof.models.resolve import bundled_folder
from oomproof.tuning.encode import Sample, SampleEncoder
from oomproof.tuning.records import Completion, Conversation, DataError, Page, Record, Text


@pytest.fixture(scope="module")
def tokenizer() -> TransformersTokenizer:
    folder = Path(bundled_folder())
    return TransformersTokenizer(folder, defaults=read_generation_defaults(folder))


def encode(tokenizer: Any, record: Record, context: int = 512) -> Sample:
    [sample] = SampleEncoder(tokenizer, context=context, name="data").encode(record)
    return sample


def learned_text(tokenizer: TransformersTokenizer, sample: Sample) -> str:
    kept = [token for token, one in zip(sample.tokens, sample.learned, strict=True) if one]
    return str(tokenizer._tokenizer.decode(kept))


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation(
        line=4, messages=tuple({"role": role, "content": content} for role, content in turns)
    )


def test_of_a_conversation_the_answers_and_their_ends_are_learned(
    tokenizer: TransformersTokenizer,
) -> None:
    sample = encode(
        tokenizer,
        chat(
            ("system", "Be kind."),
            ("user", "Who?"),
            ("assistant", "It was I."),
            ("user", "Why?"),
            ("assistant", "For love."),
        ),
    )
    assert learned_text(tokenizer, sample) == "It was I.<|end|>For love.<|end|>"
    whole = tokenizer._tokenizer.decode(list(sample.tokens))
    assert whole == (
        "<|bos|>Be kind.<|user|>Who?<|end|><|assistant|>It was I.<|end|>"
        "<|user|>Why?<|end|><|assistant|>For love.<|end|>"
    )


def test_of_a_completion_nothing_of_the_prompt_is_learned(
    tokenizer: TransformersTokenizer,
) -> None:
    sample = encode(tokenizer, Completion(line=1, prompt="Once upon", completion=" a time"))
    assert learned_text(tokenizer, sample) == " a time<|end|>"


def test_a_completion_that_melts_with_its_prompt_keeps_the_prompts_tokens(
    tokenizer: TransformersTokenizer,
) -> None:
    """'th' + 'e' would be one token: the model never sees that one when it is asked."""
    sample = encode(tokenizer, Completion(line=1, prompt="in th", completion="e house"))
    asked = [*tokenizer.prefix, *tokenizer.encode_bare("in th")]
    assert list(sample.tokens[: len(asked)]) == asked
    assert learned_text(tokenizer, sample) == "e house<|end|>"


def test_a_text_is_learned_with_its_end(tokenizer: TransformersTokenizer) -> None:
    sample = encode(tokenizer, Text(line=1, text="It was night."))
    assert learned_text(tokenizer, sample) == "It was night.<|end|>"


def test_pages_become_full_sequences_and_lose_no_token(tokenizer: TransformersTokenizer) -> None:
    encoder = SampleEncoder(tokenizer, context=32, name="data")
    texts = ["In the beginning was the word. " * 9, "And the light shone in the dark. " * 7]
    samples = [s for n, t in enumerate(texts, 1) for s in encoder.encode(Page(line=n, text=t))]
    samples += encoder.finish()
    assert {len(one.tokens) for one in samples[:-1]} == {32}
    assert samples[0].line == 1
    together = "".join(learned_text(tokenizer, one) for one in samples)
    assert together == "".join(texts) + "<|end|>"


class Template:
    """A tokenizer of letters whose chat template is given."""

    eos_token_id = 0
    chat_template: str | None = "yes"
    prefix: tuple[int, ...] = ()

    def __init__(self, *, rewrites: bool = False, melts: bool = False) -> None:
        self._rewrites, self._melts = rewrites, melts

    def encode_bare(self, text: str) -> list[int]:
        return [ord(one) for one in text]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        if self._melts:
            ends = [*range(2, len(text), 2), len(text)]
            return [1] * len(ends), ends
        return self.encode_bare(text), list(range(1, len(text) + 1))

    def render_turns(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Any = None,
        begins_answer: bool = False,
    ) -> str:
        last = len(messages) - 1
        text = "".join(
            f"{one['role'][0]}:{'' if self._rewrites and n < last else one['content']};"
            for n, one in enumerate(messages)
        )
        return text + "a:" * begins_answer

    def encode_generated(self, messages: Any, *, tools: Any = None) -> None:
        return None


def test_a_template_that_rewrites_earlier_turns_names_the_line() -> None:
    turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert encode(Template(), turns).tokens
    with pytest.raises(DataError, match=r"data, line 4: message 2: the chat template writes"):
        encode(Template(rewrites=True), turns)


def test_a_token_over_the_border_of_an_answer_names_the_line() -> None:
    with pytest.raises(DataError, match=r"line 4: a token reaches from a question"):
        encode(Template(melts=True), chat(("user", "ab"), ("assistant", "cd")))


def test_marks_of_the_template_are_taken_where_it_has_them() -> None:
    class Marked(Template):
        def encode_generated(self, messages: Any, *, tools: Any = None) -> Any:
            return [5, 6, 7], [False, True, True]

    sample = encode(Marked(rewrites=True), chat(("user", "a"), ("assistant", "b")))
    assert sample == Sample(line=4, tokens=[5, 6, 7], learned=[False, True, True])


def test_a_model_without_a_template_refuses_messages(tokenizer: TransformersTokenizer) -> None:
    class Plain(Template):
        chat_template = None

    with pytest.raises(
        DataError, match="line 4: has messages, and this model has no chat template"
    ):
        encode(Plain(), chat(("user", "a"), ("assistant", "b")))


def test_what_the_template_refuses_names_the_line(tokenizer: TransformersTokenizer) -> None:
    turns = chat(("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d"))
    with pytest.raises(DataError, match=r"line 4: the model's chat template refuses this: a mess"):
        encode(tokenizer, turns)
