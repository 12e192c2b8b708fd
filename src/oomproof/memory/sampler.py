"""The tensors that draw tokens on a device, by name and shape, for planning and for loading."""

from __future__ import annotations

from oomproof.formats import DType, ceil_div

CHUNK_TOKENS = 4096
"""Entries of the vocabulary that one program looks at."""
GROUP_TOKENS = 32
"""Entries of the vocabulary whose best score is kept, to look only where filters may cut."""
CANDIDATES = 256
"""Tokens between the bounds of a filter's search that it ends on."""
FLOAT_OPTIONS = 8
"""float32 values that a request's options take."""
INTEGER_OPTIONS = 8
"""int64 values that a request's options and random state take."""
CHUNK_VALUES = 5
"""Of each chunk: best score, mass of all scores, value drawn, largest logit, mass of all logits."""
CHUNK_PICKS = 2
"""Of each chunk: the token drawn, and that of the largest logit."""
MAX_ALTERNATIVES = 20
"""Most likely tokens beside the drawn one whose log-probabilities are kept."""
STAGED_TOKENS = 4096
"""Tokens of a prompt that are flagged at once."""


def sampler_buffers(slots: int, vocab_size: int) -> tuple[tuple[str, tuple[int, ...], DType], ...]:
    """Everything that drawing tokens for `slots` requests takes on the device with the logits."""
    chunks = ceil_div(vocab_size, CHUNK_TOKENS)
    groups = chunks * (CHUNK_TOKENS // GROUP_TOKENS)
    return (
        ("float_options", (slots, FLOAT_OPTIONS), DType.FLOAT32),
        ("integer_options", (slots, INTEGER_OPTIONS), DType.INT64),
        # Of each token: how often it was answered, and a bit for whether it is in the prompt.
        ("counts", (slots, vocab_size), DType.INT32),
        ("staged_tokens", (STAGED_TOKENS,), DType.INT32),
        ("group_best", (slots, groups), DType.FLOAT32),
        ("group_list", (slots, groups), DType.INT32),
        ("candidates", (slots, CANDIDATES), DType.INT32),
        ("chunk_values", (slots, CHUNK_VALUES, chunks), DType.FLOAT32),
        ("chunk_tokens", (slots, CHUNK_PICKS, chunks), DType.INT32),
        ("logprobs", (slots,), DType.FLOAT32),
        ("top_tokens", (slots, MAX_ALTERNATIVES), DType.INT32),
        ("top_logprobs", (slots, MAX_ALTERNATIVES), DType.FLOAT32),
    )
