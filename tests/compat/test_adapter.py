"""A LoRA adapter through transformers and peft, from our reading of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import oomproof
from oomproof.compat.adapter import add_adapter
from oomproof.errors import CheckpointError, LoadError, MissingDependencyError, PlanMismatchError
from oomproof.models.adapter import with_adapter
from oomproof.models.resolve import bundled_folder, resolve
from tests.models.adapters import ALL, ATTENTION, Tensors, write_adapter

TOKENS = list(range(100, 190))


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits[0].float()
    return found


def base_model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(bundled_folder(), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("modules", "config"),
    [
        (ATTENTION, {}),
        (ALL, {"use_rslora": True, "rank_pattern": {r"layers\.0\..*": 3, "up_proj": 24}}),
        (ALL, {"alpha_pattern": {"model.layers.1.mlp.up_proj": 1}, "layers_to_transform": [1, 2]}),
    ],
)
def test_logits_are_those_of_pefts_own_loading(
    modules: Sequence[str], config: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve("tiny"), modules, config=config)
    model = oomproof.from_pretrained("tiny", format="bf16", adapter=folder)
    theirs = peft.PeftModel.from_pretrained(base_model(), str(folder), autocast_adapter_dtype=False)
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    assert torch.equal(logits_of(model), logits_of(theirs.eval()))
    assert not torch.equal(logits_of(model), logits_of(base_model()))
    assert isinstance(model, peft.PeftModel)
    assert not model.training


def test_both_engines_add_it_to_the_same_quantized_weights(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve("tiny"), ALL)
    options: dict[str, Any] = {"format": "nf4-dq", "context": 256}
    bare, adapted = (
        _logprobs(oomproof.from_pretrained("tiny", adapter=adapter, **options))
        for adapter in (None, folder)
    )
    with oomproof.load("tiny", engine="native", adapter=folder, **options) as model:
        found = torch.tensor([one.logprob for one in model.score(TOKENS)])
    # Both round to bfloat16, each in its own places.
    assert float((found - adapted).abs().mean()) < 0.05
    assert float((bare - adapted).abs().mean()) > 0.5


def _logprobs(model: Any) -> torch.Tensor:
    wanted = torch.tensor(TOKENS[1:]).unsqueeze(1)
    found: torch.Tensor = logits_of(model)[:-1].log_softmax(dim=1).gather(1, wanted).squeeze(1)
    return found


def test_it_answers_through_the_engine(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve("tiny"), ALL)
    options: dict[str, Any] = {"format": "bf16", "adapter": folder, "context": 256}
    with oomproof.load("tiny", engine="transformers", **options) as model:
        prompt = model.tokenizer.encode("It was a dark night")
        stream = model.stream(prompt, max_new_tokens=12, temperature=0)
        answer = [*stream] and stream.tokens
    theirs = oomproof.from_pretrained("tiny", **options)
    with torch.inference_mode():
        whole = torch.tensor([[*prompt, *answer]])
        logits = theirs(input_ids=whole).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    assert float((logits.max(dim=1).values - chosen).max()) < 0.1


def test_its_bytes_are_in_the_measured_weights(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve("tiny"), ALL, rank=32)
    with oomproof.load(
        "tiny", engine="transformers", format="bf16", adapter=folder, context=256
    ) as model:
        [device] = model.plan.devices
        measured = model.measured_terms()[0]
    assert model.plan.adapter is not None
    assert model.plan.adapter.weights_bytes == 2 * model.plan.adapter.num_parameters
    assert measured.weights <= device.terms.weights
    assert measured.weights > device.terms.weights - model.plan.adapter.weights_bytes


def test_without_peft_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve("tiny"))
    monkeypatch.setattr(
        "oomproof.agreement.find_spec", lambda name: None if name == "peft" else object()
    )
    with pytest.raises(MissingDependencyError, match=r"pip install 'oomproof\[tune\]'"):
        oomproof.load("tiny", engine="transformers", format="bf16", adapter=folder)
    with oomproof.load("tiny", engine="native", format="bf16", adapter=folder):
        pass


def test_a_value_that_is_not_finite_is_found_and_named(tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[sorted(tensors)[0]][0, 0] = float("inf")

    folder = write_adapter(tmp_path / "adapter", resolve("tiny"), change=damage)
    with pytest.raises(CheckpointError, match=r"lora_A.*not finite"):
        oomproof.from_pretrained("tiny", format="bf16", adapter=folder)


def test_more_than_was_planned_is_refused(tmp_path: Path) -> None:
    small, large = (
        write_adapter(tmp_path / name, resolve("tiny"), rank=rank)
        for name, rank in (("small", 8), ("large", 16))
    )
    plan = oomproof.plan("tiny", engine="transformers", format="bf16", adapter=small)
    spec = with_adapter(resolve("tiny"), large)
    assert spec.adapter is not None
    with pytest.raises(PlanMismatchError, match="bytes of adapter"):
        add_adapter(base_model(), spec.adapter, plan)


def test_a_layer_that_peft_does_not_fill_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve("tiny"))
    monkeypatch.setattr(peft, "set_peft_model_state_dict", lambda *_, **__: None)
    with pytest.raises(LoadError, match="not as peft loaded them"):
        oomproof.from_pretrained("tiny", format="bf16", adapter=folder)
