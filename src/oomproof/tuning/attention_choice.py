"""Which attention a model is trained with, by name or by what the GPU computes fast."""

from __future__ import annotations

import logging

import torch

from oomproof.errors import InputError
from oomproof.tuning.attention import Attention, Cudnn, Documents, Flash, Plain

_MOST_FLASH_HEAD_DIM = 256
_MOST_CUDNN_HEAD_DIM = 128
_LEAST_CUDNN = 90_000
"""cuDNN 9, as torch counts."""
_LEAST_CAPABILITY = (8, 0)
_TRIED_TOKENS = 64
_log = logging.getLogger(__name__)

ATTENTION: dict[str, type[Attention]] = {"flash": Flash, "cudnn": Cudnn, "plain": Plain}
"""Name → implementation."""


def choose_attention(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    scale: float,
) -> Attention:
    """The implementation of a name, or for "auto" the one that is known to be fast there.

    That is cuDNN's, which leaves packed documents and windows to FlashAttention; a small example
    is tried first.

    Args:
        name: "auto" or a key of ATTENTION.
        device: Where queries, keys and values are.
        dtype: Theirs.
        heads: Of queries, and of keys.
        head_dim: Of each.
        scale: Of the scores.

    Raises:
        InputError: No such name, or it does not compute this.
    """
    fused = device.type == "cuda" and dtype in {torch.bfloat16, torch.float16} and not head_dim % 8
    if name == "auto":
        name = "flash" if fused and head_dim <= _MOST_FLASH_HEAD_DIM else "plain"
        if name == "flash":
            reason = _without_cudnn(device, dtype, heads, head_dim, scale)
            if reason is None:
                name = "cudnn"
            else:
                _log.info("attention is torch's FlashAttention: %s", reason)
    if name not in ATTENTION:
        raise InputError(
            f"attention {name!r} is not known", remedy=f"use auto or one of {', '.join(ATTENTION)}"
        )
    most = {"flash": _MOST_FLASH_HEAD_DIM, "cudnn": _MOST_CUDNN_HEAD_DIM}.get(name)
    if most is not None and (not fused or head_dim > most):
        raise InputError(
            f"{name} attention computes heads of a multiple of 8 up to {most} in 16 bits on a GPU, "
            f"not of {head_dim} in {dtype} on {device.type}",
            remedy="use auto",
        )
    return ATTENTION[name](scale)


def _without_cudnn(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, scale: float
) -> str | None:
    """Why cuDNN's attention is not for this; None where it is."""
    if head_dim > _MOST_CUDNN_HEAD_DIM:
        return f"cuDNN's is for heads up to {_MOST_CUDNN_HEAD_DIM}, not of {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"cuDNN's needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None or version < _LEAST_CUDNN:
        return f"cuDNN 9 is needed, there is {version or 'none'}"
    try:
        _try(Cudnn(scale), device, dtype, heads, head_dim)
    except torch.OutOfMemoryError:
        raise
    # Whatever the library says of a shape that it does not compute.
    except RuntimeError as error:
        return f"cuDNN refuses {heads[0]} and {heads[1]} heads of {head_dim}: {error}"
    return None


def _try(
    attention: Attention,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
) -> None:
    """Computes a small example, as a layer would.

    Raises:
        RuntimeError: It cannot be computed.
    """
    queries, keys = heads
    documents = Documents(bounds=(0, _TRIED_TOKENS), length=_TRIED_TOKENS, cumulative=None)
    whole = torch.ones(_TRIED_TOKENS, queries + 2 * keys, head_dim, dtype=dtype, device=device)
    qkv = whole.split((queries, keys, keys), dim=1)
    attended = attention.forward(qkv, documents, 0)
    found = attention.backward(torch.ones_like(attended.out), qkv, attended, documents, 0)
    if not all(bool(one.isfinite().all()) for one in (attended.out, *found)):
        raise RuntimeError("its results are not finite")
