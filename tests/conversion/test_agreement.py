"""A folder in 4 bits is one model, whoever wrote it and whoever reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from oomproof.engine.native import scoring
from oomproof.quantization.handlers import handler
from oomproof.session import load
from tests.conversion.jobs import (
    FORMATS,
    SOURCE,
    TOKENS,
    as_theirs,
    logits_of,
    quantized,
    transformers_model,
)

DTYPES = ("bfloat16", "float16", "float32")


def plain_logits(model: Any) -> torch.Tensor:
    """transformers' logits by way of the weights that its codes stand for.

    In inference on a processor bitsandbytes has a kernel of its own that rounds inputs to bfloat16
    whatever is computed in; models that train do without, as GPUs do.
    """
    return logits_of(model.train())


def native_logits(folder: Path | str, dtype: str, **options: Any) -> torch.Tensor:
    """The native engine's, float32 [tokens, vocab]."""
    own, seen = scoring._scores, []

    def scores(pieces: Any, targets: Any) -> Any:
        held = [piece.clone() for piece in pieces]
        seen.extend(held)
        return own(iter(held), targets)

    cache = "fp32" if dtype == "float32" else "bf16"
    options |= {"compute_dtype": dtype, "kv_format": cache, "worker": False}
    with (
        patch.object(scoring, "_scores", scores),
        load(folder, engine="native", **options) as model,
    ):
        model.score([*TOKENS[0].tolist(), 1])
    return torch.cat(seen)


def dense_model(format_name: str, dtype: torch.dtype, *, search: bool) -> Any:
    """transformers' model in 16 or 32 bits, of the weights that our codes stand for."""
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=dtype)
    held = handler(format_name, search=search)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            shape = (parameter.shape[0], parameter.shape[1])
            parameter.data = held.decode(held.encode(parameter.data), shape, dtype)
    return model


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_transformers_has_the_logits_of_our_own_codes(
    format_name: str, dtype: str, search: bool, tmp_path: Path
) -> None:
    out = quantized(tmp_path / "out", format=format_name, dtype=dtype, search=search)
    theirs = transformers_model(out)
    assert theirs.dtype is getattr(torch, dtype)
    found = plain_logits(theirs)
    dense = dense_model(format_name, theirs.dtype, search=search)
    assert torch.equal(found, logits_of(dense))
    ours = native_logits(out, dtype)
    apart = (ours - found[0].float()).abs().max() / found.float().std()
    # Two engines add up in their own orders: what is left is rounding, and in float32 next to none.
    assert apart < {"bfloat16": 0.08, "float16": 0.08, "float32": 1e-5}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_folder_of_transformers_is_one_model_in_both(
    format_name: str, dtype: str, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    theirs = transformers_model(SOURCE, format_name, getattr(torch, dtype))
    theirs.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SOURCE / name).read_bytes())
    ours = native_logits(folder, dtype)
    expected = plain_logits(transformers_model(folder))[0].float()
    apart = (ours - expected).abs().max() / expected.std()
    assert apart < {"bfloat16": 0.08, "float16": 0.08, "float32": 1e-5}[dtype]
    if format_name == "nf4":  # in other formats its kernel for processors misses a code or two
        own = as_theirs(tmp_path / "own", format=format_name, dtype=dtype)
        assert torch.equal(native_logits(own, dtype), ours)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("format_name", FORMATS)
def test_the_native_engine_has_one_answer_from_folder_and_source(
    format_name: str, search: bool, tmp_path: Path
) -> None:
    out = quantized(tmp_path / "out", format=format_name, search=search)
    source = native_logits("tiny", "bfloat16", format=format_name, search=search)
    assert torch.equal(native_logits(out, "bfloat16"), source)
