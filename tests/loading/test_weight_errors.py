"""Errors of a checkpoint's weights, measured on samples and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oomproof.errors import CheckpointError
from oomproof.loading import weight_errors
from oomproof.loading.weight_errors import measured_errors, relative_error
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.planning.damage import FIT_FORMATS, NORMAL_ERRORS


def test_every_linear_is_measured_in_every_format_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, environ = resolve("tiny"), {"OOMPROOF_HOME": str(tmp_path)}
    first = measured_errors(bundled_folder(), spec, environ)
    assert len(first.of_tensors) == 5 * 7
    for errors in first.of_tensors.values():
        assert errors.keys() == set(FIT_FORMATS)
        assert errors["nf4-dq"] > errors["nf4-g16"] > errors["int8"] > 0
    monkeypatch.setattr(weight_errors, "_measure", lambda *_: pytest.fail("measured again"))
    assert measured_errors(bundled_folder(), spec, environ) == first


def test_a_sample_is_near_the_whole_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 1024, generator=generator).bfloat16()
    for name in FIT_FORMATS:
        assert relative_error(weight[::8], name) == pytest.approx(
            relative_error(weight, name), rel=0.1
        )


def test_normal_weights_have_the_errors_that_are_assumed() -> None:
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, expected in NORMAL_ERRORS.items():
        assert relative_error(weight, name) == pytest.approx(expected, rel=0.02)


def test_a_weight_of_zeros_has_no_error() -> None:
    assert relative_error(torch.zeros(4, 128), "nf4-dq") == 0


def test_what_was_kept_and_is_damaged_is_measured_again(tmp_path: Path) -> None:
    spec, environ = resolve("tiny"), {"OOMPROOF_HOME": str(tmp_path)}
    first = measured_errors(bundled_folder(), spec, environ)
    (kept,) = (tmp_path / "weight-errors").iterdir()
    kept.write_text("{")
    assert measured_errors(bundled_folder(), spec, environ) == first


def test_a_file_that_is_too_short_is_named(tmp_path: Path) -> None:
    spec = resolve("tiny")
    assert spec.checkpoint is not None
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*ends inside tensor"):
        measured_errors(tmp_path, spec, {"OOMPROOF_HOME": str(tmp_path / "home")})
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        measured_errors(tmp_path, replace(spec, checkpoint=None), {})
