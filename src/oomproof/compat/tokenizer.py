"""Text to tokens and back, through the tokenizer that a model ships."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from oomproof.engine.messages import SamplingOptions
from oomproof.engine.model import GenerationDefaults, Message
from oomproof.errors import CheckpointError, RequestError
from oomproof.models.checkpoint import MAX_CONFIG_BYTES
from oomproof.models.folder import read_bounded


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
        self.has_chat_template = bool(self._tokenizer.chat_template)
        """Whether the model knows turns of a conversation."""
        self.stop_tokens = defaults.stop_tokens | (frozenset() if own is None else {own})
        """Tokens that end an answer."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of plain text, with the special tokens that begin a document.

        Raises:
            RequestError: The text holds lone surrogates.
        """
        _require_unicode(text)
        return tuple(self._tokenizer.encode(text))

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a conversation, up to where the answer begins.

        Raises:
            RequestError: The template refuses the roles or their order, or fails; a message holds
                lone surrogates.
        """
        for message in messages:
            _require_unicode("".join(message.values()))
        try:
            encoded = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                return_dict=True,
            )
        except Exception as error:
            # A template is code of the model's: it can fail with any exception there is.
            raise RequestError(
                f"the model's chat template refuses this: {_first_line(error)}"
            ) from error
        return tuple(encoded["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


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
