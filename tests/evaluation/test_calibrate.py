"""What errors cost on a text: the same gradients as transformers', measured once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from oomproof.errors import InputError, NotRunnableError, PlanDoesNotFitError
from oomproof.evaluation import calibrate
from oomproof.evaluation.backward import fisher_noise
from oomproof.evaluation.calibrate import calibrated, cut_inputs, sensitivities
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.models.resolve import bundled_folder, resolve, with_checkpoint
from oomproof.planning.damage import WeightErrors, groups_of
from tests.compat.checkpoints import random_checkpoint

FAMILIES = ("llama", "llama, tied", "llama, stretched", "granite", "qwen2, sliding", "qwen3")
WORDS = "It was a dark night, and the rain fell upon the sea. The captain stood at the wheel. "


def costs_of_transformers(folder: Path, inputs: list[list[int]]) -> dict[str, float]:
    """The same sums from whole gradients of transformers' model, for the same noise."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = groups_of(resolve(str(folder)), QUANTIZED_ROLES["native"])
    weights = dict(model.named_parameters())
    names = [tensor.name for group in groups.values() for tensor in group]
    costs = dict.fromkeys(names, 0.0)
    generator = torch.Generator().manual_seed(0)
    for row in inputs:
        logits = model(torch.tensor([row])).logits[0]
        noise = fisher_noise(logits.detach(), generator)
        gradients = torch.autograd.grad(logits, [weights[name] for name in names], noise)
        for name, gradient in zip(names, gradients, strict=True):
            rows = weights[name].detach().square().sum(dim=1) * gradient.square().sum(dim=1)
            costs[name] += 0.5 * float(rows.sum()) / gradient.shape[1]
    tokens = len(inputs) * len(inputs[0])
    return {
        group: sum(costs[tensor.name] for tensor in tensors) / tokens
        for group, tensors in groups.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_groups_cost_is_that_of_transformers_gradients(tmp_path: Path, family: str) -> None:
    folder = random_checkpoint(tmp_path, family, std=0.05)
    spec = with_checkpoint(resolve(str(folder)))
    assert spec.forward is not None
    generator = torch.Generator().manual_seed(3)
    inputs: list[list[int]] = torch.randint(4, 2048, (2, 48), generator=generator).tolist()
    found = sensitivities(folder, spec, spec.forward, inputs)
    expected = costs_of_transformers(folder, inputs)
    assert found == {name: pytest.approx(cost, rel=2e-3) for name, cost in expected.items()}


def test_noise_has_the_covariance_of_the_fisher_information() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0, 0.0]]).repeat(40_000, 1)
    noise = fisher_noise(logits, torch.Generator().manual_seed(1))
    probabilities = torch.softmax(logits[0], dim=0)
    expected = probabilities.diag() - probabilities.outer(probabilities)
    torch.testing.assert_close(noise.t() @ noise / len(noise), expected, atol=5e-3, rtol=0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS * 60)
    return path


def measured(text: Path, home: Path) -> WeightErrors:
    environ = {"OOMPROOF_HOME": str(home)}
    return calibrated(WeightErrors(), bundled_folder(), resolve("tiny"), text, environ=environ)


def test_a_text_is_measured_once_and_another_one_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "WINDOWS", 2)
    monkeypatch.setattr(calibrate, "CONTEXT", 64)
    first = measured(text, tmp_path)
    assert len(first.sensitivities) == 5 * 4
    assert all(cost > 0 for cost in first.sensitivities.values())
    assert first.source.endswith("weighed by what they cost on words.txt")
    (kept,) = (tmp_path / "calibrations").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "sensitivities", lambda *_, **__: pytest.fail("measured again"))
        assert measured(text, tmp_path) == first
    kept.write_text('{"sensitivities": {"0.qkv": 1}}')
    assert measured(text, tmp_path) == first
    text.write_text(WORDS.upper() * 60)
    assert measured(text, tmp_path).sensitivities != first.sensitivities


class _Letters:
    prefix = (1,)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        return [ord(letter) for letter in text], list(range(1, len(text) + 1))


def test_windows_are_spread_over_the_text_and_begin_as_documents_do() -> None:
    text = "".join(map(chr, range(100, 150)))
    found = cut_inputs(text, _Letters(), 6, name="it")
    assert len(found) == calibrate.WINDOWS
    assert found[0] == (1, 100, 101, 102, 103, 104)
    assert found[-1] == (1, 145, 146, 147, 148, 149)
    assert cut_inputs(text[:7], _Letters(), 6, name="it") == [found[0]]


def test_a_text_below_a_window_is_refused(text: Path, tmp_path: Path) -> None:
    text.write_text(WORDS)
    with pytest.raises(InputError, match=r"words.txt' has \d+ tokens, one window needs 255"):
        measured(text, tmp_path)


def test_a_family_without_our_decoder_is_refused(text: Path, tmp_path: Path) -> None:
    spec = replace(resolve("tiny"), forward=None, not_native="it has no decoder here")
    with pytest.raises(NotRunnableError, match="cannot be calibrated: it has no decoder here"):
        calibrated(WeightErrors(), bundled_folder(), spec, text)


def test_too_little_memory_is_refused_before_anything_is_read() -> None:
    spec = resolve("tiny")
    assert spec.forward is not None
    small = DeviceSpec(index=0, name="cpu", kind="cpu", total_bytes=1 << 20, free_bytes=1 << 20)
    with pytest.raises(PlanDoesNotFitError, match="calibrating tiny needs"):
        sensitivities(bundled_folder(), spec, spec.forward, [[1, 2, 3]], device=small)


def test_a_token_without_an_embedding_is_refused(text: Path) -> None:
    spec = replace(resolve("tiny"), vocab_size=4)
    with pytest.raises(InputError, match="outside the vocabulary of 4"):
        calibrated(WeightErrors(), bundled_folder(), spec, text)
