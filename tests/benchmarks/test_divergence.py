"""What formats do to the bundled model's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.divergence import Divergence, stored_bytes

from oomproof.evaluation.calibrate import calibrated
from oomproof.loading.weight_errors import measured_errors
from oomproof.models.resolve import bundled_folder
from oomproof.planning.damage import FIT_FORMATS, item_of
from oomproof.planning.fit import choose

pytest.importorskip("transformers")

OTHER = (
    "It was a dark night, and the rain fell upon the sea. The captain stood at the wheel, and "
    "spoke to no man. In the morning they saw the land, a long grey line under the clouds; and "
    'when they came near, a boat put out from it. "Who are you," said the man in it, "and what do '
    'you want?" '
)


@pytest.fixture(scope="module")
def model() -> Divergence:
    text = (bundled_folder() / "README.md").read_text(encoding="utf-8").partition("## Samples")[2]
    return Divergence(bundled_folder(), text, 1024, 256)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))


def test_searched_scales_diverge_less_at_the_same_bytes(model: Divergence) -> None:
    for name in ("nf4-dq", "int4"):
        plain = model.of(model.uniform(name), search=False)
        searched = model.of(model.uniform(name), search=True)
        assert searched["bytes"] == plain["bytes"]
        assert searched["relative_squared_error"] < 0.88 * plain["relative_squared_error"]
        assert searched["kl"] < 0.95 * plain["kl"]


def test_blocks_of_16_diverge_less_than_nf4_at_its_bytes(model: Divergence) -> None:
    fine = model.of(model.uniform("nf4-g16"), search=True)
    nf4 = model.of(model.uniform("nf4"), search=True)
    # A table of 1 KiB a tensor is something for the small tensors of this model.
    assert fine["bytes"] < nf4["bytes"] * 1.03
    assert fine["relative_squared_error"] < 0.75 * nf4["relative_squared_error"]
    assert fine["kl"] < 0.85 * nf4["kl"]


def test_a_mixture_diverges_less_than_the_uniform_format_of_its_bytes(model: Divergence) -> None:
    errors = measured_errors(bundled_folder(), model.spec)
    formats = (*FIT_FORMATS, "bf16")
    items = [item_of(name, g, formats, errors, stored_bytes) for name, g in model.groups.items()]
    least, budget = (model.size_bytes(model.uniform(name)) for name in ("nf4-dq", "nf4"))
    fit = choose(items, budget)
    assert fit is not None
    assert fit.size_bytes - least >= 0.95 * (budget - least)
    by_tensor = {
        tensor.name: choice.format
        for group, choice in zip(model.groups.values(), fit.chosen, strict=True)
        for tensor in group
    }
    mixed = model.of(by_tensor, search=True)
    assert mixed["bytes"] <= budget
    assert mixed["kl"] < 0.85 * model.of(model.uniform("nf4"), search=True)["kl"]


def test_calibrated_on_other_text_a_mixture_diverges_less_at_the_same_bytes(
    model: Divergence, tmp_path: Path
) -> None:
    text = tmp_path / "words.txt"
    text.write_text(OTHER * 50)
    free = measured_errors(bundled_folder(), model.spec)
    own = calibrated(free, bundled_folder(), model.spec, text)
    formats = (*FIT_FORMATS, "bf16")
    low, high = (model.size_bytes(model.uniform(name)) for name in ("nf4-dq", "int8"))
    budget = (low + high) // 2
    kl = []
    for errors in (own, free):
        items = [
            item_of(name, g, formats, errors, stored_bytes) for name, g in model.groups.items()
        ]
        fit = choose(items, budget)
        assert fit is not None
        assert fit.size_bytes <= budget
        by_tensor = {
            tensor.name: choice.format
            for group, choice in zip(model.groups.values(), fit.chosen, strict=True)
            for tensor in group
        }
        kl.append(model.of(by_tensor, search=True)["kl"])
    assert kl[0] < 0.9 * kl[1]
