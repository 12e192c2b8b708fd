"""Text to tokens and back, through the tokenizer that a model ships."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from oomproof.errors import CheckpointError, RequestError

Message = Mapping[str, str]
"""A turn of a conversation: {"role": "user", "content": "…"}."""


class Tokenizer:
    """A model's tokenizer, with its chat template.

    Raises:
        CheckpointError: The folder holds no tokenizer that can be read.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(str(folder), f"no tokenizer can be read: {reason}") from None

    @property
    def has_chat_template(self) -> bool:
        """Whether the model knows turns of a conversation."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of plain text, with the special tokens that begin a document."""
        return tuple(self._tokenizer.encode(text))

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a conversation, up to where the answer begins.

        Raises:
            RequestError: The template refuses the roles or their order.
        """
        from jinja2 import TemplateError

        try:
            encoded = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                return_dict=True,
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses this: {error}") from None
        return tuple(encoded["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stop_tokens(self, generation_config: Any) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's own, and those of the generation config."""
        configured = getattr(generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*ids, self._tokenizer.eos_token_id) if i is not None)
