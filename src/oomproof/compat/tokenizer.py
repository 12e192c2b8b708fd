"""Text to tokens and back, through the tokenizer that a model ships."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from oomproof.engine.messages import SamplingOptions
from oomproof.engine.model import GenerationDefaults, Message
from oomproof.errors import CheckpointError, RequestError
from oomproof.models.checkpoint import MAX_CONFIG_BYTES
from oomproof.models.folder import read_bounded

_GENERATION = re.compile(r"\{%-?\s*generation\b")


class TransformersTokenizer:
    """A model's tokenizer, with its chat template; implements `engine.model.Tokenizer`.

    Args:
        folder: Where the tokenizer's files are.
        defaults: What the folder's generation_config.json sets.
        trust_remote_code: Lets transformers run code that the folder ships.

    Raises:
        CheckpointError: The folder holds no tokenizer that can be read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        defaults: GenerationDefaults,
        trust_remote_code: bool = False,
    ) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            # transformers reads config.json and the tokenizer's files, and raises a dozen types.
            raise CheckpointError(
                str(folder),
                f"config.json or the tokenizer's files cannot be read: {_first_line(error)}",
            ) from error
        own = self._tokenizer.eos_token_id
        self.chat_template: str | None = _template(self._tokenizer.chat_template)
        """How the model writes a conversation, None where it does not."""
        self.has_chat_template = self.chat_template is not None
        """Whether the model knows turns of a conversation."""
        self.eos_token_id: int | None = own
        """The token that ends a document, None where the model has none."""
        self.stop_tokens = defaults.stop_tokens | (frozenset() if own is None else {own})
        """Tokens that end an answer."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of plain text, with the special tokens that begin a document.

        Raises:
            RequestError: The text holds lone surrogates.
        """
        _require_unicode(text)
        return tuple(self._tokenizer.encode(text))

    @property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens that begin a document; none where the model has none.

        Raises:
            RequestError: The tokenizer cannot tell.
        """
        marked, plain = (
            self._tokenizer.encode("a", add_special_tokens=special) for special in (True, False)
        )
        if not plain or plain[0] not in marked:
            raise RequestError(
                "this model's tokenizer does not tell which tokens begin a document: it makes "
                "none of 'a', or others where a document begins"
            )
        return tuple(marked[: next(n for n, token in enumerate(marked) if token == plain[0])])

    def encode_bare(self, text: str) -> list[int]:
        """Tokens of plain text without those that begin a document.

        Raises:
            RequestError: The text holds lone surrogates.
        """
        _require_unicode(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def render_chat(self, messages: Sequence[Message], *, begins_answer: bool = True) -> str:
        """A conversation as the model's template writes it.

        Args:
            messages: Its turns.
            begins_answer: Whether an answer of the model's comes next; else the last turn goes on.

        Raises:
            RequestError: The template refuses the roles or their order, or fails.
        """
        return str(self._chat(messages, tokenize=False, begins_answer=begins_answer))

    def render_turns(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        begins_answer: bool = False,
    ) -> str:
        """Whole turns as the model's template writes them, with what begins an answer where asked.

        Raises:
            RequestError: The template refuses them, or fails.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=None if tools is None else [dict(tool) for tool in tools],
                    tokenize=False,
                    add_generation_prompt=begins_answer,
                )
            )
        except Exception as error:
            raise RequestError(
                f"the model's chat template refuses this: {_first_line(error)}"
            ) from error

    def encode_generated(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[bool]] | None:
        """Tokens of whole turns, and which of them the template marks as generated.

        None where the template marks nothing (transformers' `{% generation %}`).

        Raises:
            RequestError: The template refuses them, or fails.
        """
        if self.chat_template is None or not _GENERATION.search(self.chat_template):
            return None
        try:
            found = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception as error:
            raise RequestError(
                f"the model's chat template refuses this: {_first_line(error)}"
            ) from error
        return list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens of plain text without special ones, and the character where each ends.

        Raises:
            RequestError: The text holds lone surrogates, or the tokenizer cannot tell where.
        """
        _require_unicode(text)
        if not self._tokenizer.is_fast:
            raise RequestError(
                "this model's tokenizer does not tell where its tokens end in a text"
            )
        found = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(found["input_ids"]), [end for _, end in found["offset_mapping"]]

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a conversation, up to where the answer begins.

        Raises:
            RequestError: The template refuses the roles or their order, or fails; a message holds
                lone surrogates.
        """
        for message in messages:
            _require_unicode("".join(message.values()))
        return tuple(self._chat(messages, return_dict=True)["input_ids"])

    def _chat(
        self, messages: Sequence[Message], *, begins_answer: bool = True, **options: bool
    ) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=begins_answer,
                continue_final_message=not begins_answer,
                **options,
            )
        except Exception as error:
            # A template is code of the model's: it can fail with any exception there is.
            raise RequestError(
                f"the model's chat template refuses this: {_first_line(error)}"
            ) from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def _template(found: Any) -> str | None:
    """A tokenizer may have several by name."""
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), None)
    return str(found) if found else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not UTF-8 text: {error.reason}") from None


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """What the folder's generation_config.json sets; nothing where there is none.

    Raises:
        CheckpointError: The file is not what it should be.
    """
    from pydantic import TypeAdapter, ValidationError

    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    try:
        defaults = TypeAdapter(GenerationDefaults).validate_json(
            read_bounded(path, bound_bytes=MAX_CONFIG_BYTES)
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise CheckpointError(str(path), f"field {field!r}: {first['msg']}") from None
    given = {"temperature": defaults.temperature, "top_k": defaults.top_k, "top_p": defaults.top_p}
    try:
        SamplingOptions(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except RequestError as error:
        raise CheckpointError(str(path), error.message) from None
    return defaults
