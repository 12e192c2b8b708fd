"""Causal attention with its gradient, called explicitly: what the forward pass leaves is kept.

Queries, keys and values are [tokens, heads, head dim], with one token after the other; documents
that are packed into a step do not see each other. On a GPU it is torch's FlashAttention-2
(arXiv:2307.08691) or cuDNN's; elsewhere plain torch, document by document.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

Tensors = tuple[torch.Tensor, ...]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of queries, keys and values, each [tokens, heads, head dim]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Where the documents of a step lie."""

    bounds: tuple[int, ...]
    """First token of each, then the number of tokens."""
    length: int
    """Of the longest row that they were packed into."""
    cumulative: torch.Tensor | None
    """`bounds`, int32 on the device; None where each document is a whole row."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.bounds[-1] // self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class Attended:
    """What attention's forward pass leaves."""

    out: torch.Tensor
    """[tokens, heads × head dim], contiguous."""
    lse: torch.Tensor
    """Log-sum-exp of the scores, float32, in the shape that its gradient takes."""
    state: Tensors
    """What else its gradient takes: tensors of a few bytes."""


class Attention(ABC):
    """An implementation.

    Args:
        scale: Of the scores.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale

    @abstractmethod
    def forward(self, qkv: Sequence[torch.Tensor], documents: Documents, window: int) -> Attended:
        """Attention of each token to its document's, up to itself.

        Args:
            qkv: Queries, keys and values, rotated.
            documents: Where they lie.
            window: Tokens that one looks back at, itself included; 0 for all.
        """

    @abstractmethod
    def backward(
        self,
        grad: torch.Tensor,
        qkv: Sequence[torch.Tensor],
        attended: Attended,
        documents: Documents,
        window: int,
    ) -> Gradients:
        """The gradients of queries, keys and values.

        Args:
            grad: Of the output, [tokens, heads × head dim], contiguous.
            qkv: As forward took them.
            attended: What it left.
            documents: As there.
            window: As there.
        """


class Flash(Attention):
    """torch's FlashAttention-2, of packed documents too."""

    def forward(self, qkv: Sequence[torch.Tensor], documents: Documents, window: int) -> Attended:
        """See Attention."""
        heads = [self._in_rows(part, documents) for part in qkv]
        cumulative, length = documents.cumulative, documents.length
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(  # noqa: SLF001
            *heads,
            cumulative,
            cumulative,
            length,
            length,
            0.0,
            True,
            False,
            scale=self._scale,
            window_size_left=window - 1 if window else None,
            window_size_right=0 if window else None,
        )
        return Attended(out=out.reshape(documents.bounds[-1], -1), lse=lse, state=(seed, unused))

    def backward(
        self,
        grad: torch.Tensor,
        qkv: Sequence[torch.Tensor],
        attended: Attended,
        documents: Documents,
        window: int,
    ) -> Gradients:
        """See Attention."""
        heads = [self._in_rows(part, documents) for part in qkv]
        cumulative, length = documents.cumulative, documents.length
        found = torch.ops.aten._flash_attention_backward(  # noqa: SLF001
            grad.view(heads[0].shape),
            *heads,
            attended.out.view(heads[0].shape),
            attended.lse,
            cumulative,
            cumulative,
            length,
            length,
            0.0,
            True,
            *attended.state,
            scale=self._scale,
            window_size_left=window - 1 if window else None,
            window_size_right=0 if window else None,
        )
        query, key, value = (part.reshape(one.shape) for part, one in zip(found, qkv, strict=True))
        return query, key, value

    @staticmethod
    def _in_rows(part: torch.Tensor, documents: Documents) -> torch.Tensor:
        """[rows, length, heads, head dim], or as it is where documents are packed."""
        if documents.cumulative is not None:
            return part
        return part.view(documents.rows, documents.length, *part.shape[1:])


class Cudnn(Attention):
    """cuDNN's, for whole rows without a window; packed documents are FlashAttention's."""

    def __init__(self, scale: float) -> None:
        super().__init__(scale)
        self._flash = Flash(scale)

    def forward(self, qkv: Sequence[torch.Tensor], documents: Documents, window: int) -> Attended:
        """See Attention."""
        if documents.cumulative is not None or window:
            return self._flash.forward(qkv, documents, window)
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(  # noqa: SLF001
            *(_heads_first(part, documents) for part in qkv),
            None,
            True,
            0.0,
            True,
            False,
            scale=self._scale,
        )
        out, lse, seed, offset = found[0], found[1], found[6], found[7]
        rows = out.transpose(1, 2).reshape(documents.bounds[-1], -1)
        return Attended(out=rows, lse=lse, state=(seed, offset))

    def backward(
        self,
        grad: torch.Tensor,
        qkv: Sequence[torch.Tensor],
        attended: Attended,
        documents: Documents,
        window: int,
    ) -> Gradients:
        """See Attention."""
        if documents.cumulative is not None or window:
            return self._flash.backward(grad, qkv, attended, documents, window)
        shape = qkv[0].shape
        seed, offset = attended.state
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(  # noqa: SLF001
            _heads_first(grad.view(shape), documents),
            *(_heads_first(part, documents) for part in qkv),
            _heads_first(attended.out.view(shape), documents),
            attended.lse,
            seed,
            offset,
            None,
            None,
            None,
            documents.length,
            documents.length,
            0.0,
            True,
            scale=self._scale,
        )
        query, key, value = (
            part.transpose(1, 2).reshape(one.shape) for part, one in zip(found, qkv, strict=True)
        )
        return query, key, value


class Plain(Attention):
    """Its meaning in plain torch, in float32 or more; scores of a document are there at once."""

    def forward(self, qkv: Sequence[torch.Tensor], documents: Documents, window: int) -> Attended:
        """See Attention."""
        query, *_ = qkv
        tokens, heads, head_dim = query.shape
        out = query.new_empty(tokens, heads, head_dim)
        lse = query.new_empty(heads, tokens, dtype=_wide(query).dtype)
        for first, end in pairwise(documents.bounds):
            left, keys, values = self._document(qkv, first, end)
            scores = self._scores(left, keys, window)
            lse[:, first:end] = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - lse[:, first:end, None])
            out[first:end] = (weights @ values).transpose(0, 1)
        return Attended(out=out.view(tokens, -1), lse=lse, state=())

    def backward(
        self,
        grad: torch.Tensor,
        qkv: Sequence[torch.Tensor],
        attended: Attended,
        documents: Documents,
        window: int,
    ) -> Gradients:
        """See Attention."""
        found = tuple(torch.empty_like(part) for part in qkv)
        shape = qkv[0].shape
        groups = shape[1] // qkv[1].shape[1]
        grad, out = grad.view(shape), attended.out.view(shape)
        for first, end in pairwise(documents.bounds):
            left, keys, values = self._document(qkv, first, end)
            above = _wide(grad[first:end]).transpose(0, 1)
            scores = self._scores(left, keys, window)
            weights = torch.exp(scores - attended.lse[:, first:end, None])
            delta = (above * _wide(out[first:end]).transpose(0, 1)).sum(dim=-1, keepdim=True)
            inner = weights * (above @ values.transpose(1, 2) - delta) * self._scale
            for into, part in zip(
                found,
                (inner @ keys, inner.transpose(1, 2) @ left, weights.transpose(1, 2) @ above),
                strict=True,
            ):
                heads = into.shape[1]
                shared = part if heads == shape[1] else part.unflatten(0, (heads, groups)).sum(1)
                into[first:end] = shared.transpose(0, 1)
        query, key, value = found
        return query, key, value

    @staticmethod
    def _document(qkv: Sequence[torch.Tensor], first: int, end: int) -> Gradients:
        """A document's, [heads, tokens, head dim], keys and values once a query head."""
        heads = qkv[0].shape[1]
        query, key, value = (
            _wide(part[first:end]).transpose(0, 1).repeat_interleave(heads // part.shape[1], dim=0)
            for part in qkv
        )
        return query, key, value

    def _scores(self, query: torch.Tensor, key: torch.Tensor, window: int) -> torch.Tensor:
        place = torch.arange(query.shape[1], device=query.device)
        back = place[:, None] - place
        unseen = (back < 0) | (back >= window) if window else back < 0
        return (query @ key.transpose(1, 2) * self._scale).masked_fill(unseen, float("-inf"))


def _heads_first(part: torch.Tensor, documents: Documents) -> torch.Tensor:
    """[rows, heads, length, head dim]."""
    return part.view(documents.rows, documents.length, *part.shape[1:]).transpose(1, 2)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype is torch.float64 else values.float()
