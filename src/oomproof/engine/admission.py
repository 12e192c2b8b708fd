"""What an engine refuses before it starts: requests that the planned context can never hold."""

from __future__ import annotations

from oomproof.engine.messages import Request
from oomproof.errors import RequestError


def check_request(request: Request, *, context: int, vocab_size: int, max_context: int = 0) -> None:
    """Refuses a request that cannot be served, however long it waits.

    Args:
        request: The request.
        context: Prompt and answer that the plan has room for, in tokens.
        vocab_size: Entries of a row of logits.
        max_context: The largest context that would fit here; 0 where that is not known.

    Raises:
        RequestError: Prompt and answer do not fit in `context` tokens, or a token is outside the
            vocabulary.
    """
    prompt = len(request.prompt_tokens)
    if prompt + request.max_new_tokens > context:
        room = context - prompt
        needed = prompt + request.max_new_tokens
        remedy = (
            f"ask for at most {room:,} new tokens"
            if room > 0
            else f"shorten the prompt to fewer than {context:,} tokens"
        )
        raise RequestError(
            f"a prompt of {prompt:,} tokens and an answer of up to "
            f"{request.max_new_tokens:,} do not fit in the planned context of {context:,}",
            remedy=f"{remedy}, or plan with --context {needed}"
            if not 0 < max_context < needed
            else f"{remedy}; the largest context that fits here is {max_context:,}",
        )
    if not 0 <= min(request.prompt_tokens) <= max(request.prompt_tokens) < vocab_size:
        raise RequestError(f"a prompt token is outside the vocabulary of {vocab_size:,}")
