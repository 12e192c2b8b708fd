"""bitsandbytes checkpoints made by transformers: planned from their headers, and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from oomproof.models.resolve import bundled_folder
from oomproof.session import load, plan

SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "llm-int8": {"load_in_8bit": True},
}


def checkpoint(folder: Path, format_name: str) -> Path:
    """The bundled model as transformers saves it in that format."""
    settings = SETTINGS[format_name]
    if "load_in_4bit" in settings:
        settings = {**settings, "bnb_4bit_compute_dtype": "bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(
        bundled_folder(),
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(**settings),
        device_map={"": "cpu"},
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_folder()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("format_name", list(SETTINGS))
def test_a_quantized_checkpoint_answers_as_its_source_quantized_here_does(
    format_name: str, tmp_path: Path
) -> None:
    # Of 8 bits our own engine takes the codes (tests/engine/native/test_stored_8bit.py).
    made = plan(checkpoint(tmp_path / "model", format_name), engine="transformers")
    assert (made.format, made.runnable, made.fits) == (format_name, True, True)
    assert (made.quantized_checkpoint, made.engine) == ("bitsandbytes", "transformers")
    assert made.to_transformers()["quantization_config"] is None
    source = plan("tiny", engine="transformers", format=format_name)
    assert made.devices[0].terms.weights == source.devices[0].terms.weights
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
    with load(made) as model:
        answer = model.generate("It was a dark night", **options)
    with load(source) as model:
        assert model.generate("It was a dark night", **options) == answer
