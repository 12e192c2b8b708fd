"""The way over transformers and peft: the same losses and gradients, in chunks and packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from oomproof.errors import CheckpointError, InputError, NotRunnableError
from oomproof.models.resolve import bundled_folder
from oomproof.tuning import peft_model
from oomproof.tuning.options import AdapterSettings
from oomproof.tuning.peft_model import IGNORED, PeftTrainingModel, refuse_leaking_packs

TOKENS = torch.randint(4, 2000, (2, 48), generator=torch.Generator().manual_seed(0))


def build(**options: object) -> PeftTrainingModel:
    base = AutoModelForCausalLM.from_pretrained(bundled_folder(), dtype=torch.float32)
    settings = {"rank": 4, "dropout": 0.0, **options}
    checkpointing = str(settings.pop("checkpointing", "none"))
    model = PeftTrainingModel(
        base,
        AdapterSettings(**settings),  # type: ignore[arg-type]
        base_id="tiny",
        checkpointing=checkpointing,
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def test_only_the_adapter_is_trained_and_its_names_are_pefts() -> None:
    names = [n for n, p in build().named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 5
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


@pytest.mark.parametrize("checkpointing", ["none", "layers"])
def test_the_loss_in_chunks_is_transformers_own(
    checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_model, "CHUNK_POSITIONS", 7)
    model = build(checkpointing=checkpointing).train()
    labels = TOKENS.clone()
    labels[0, :20] = IGNORED
    loss = model(TOKENS, labels).loss
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs = model.peft(input_ids=TOKENS, labels=labels).loss
    theirs.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_sum_is_divided_by_what_the_whole_step_has() -> None:
    model = build().eval()
    alone = model(TOKENS, TOKENS).loss
    shared = model(TOKENS, TOKENS, num_items_in_batch=torch.tensor(188.0)).loss
    torch.testing.assert_close(alone * 94, shared * 188)


def test_packed_documents_have_the_losses_that_they_have_alone() -> None:
    model = build().eval()
    first, second = TOKENS[:1, :20], TOKENS[1:, :28]
    packed = torch.cat([first, second], 1)
    labels = packed.clone()
    labels[:, 20] = IGNORED
    positions = torch.cat([torch.arange(20), torch.arange(28)])[None]
    together = model(packed, labels, position_ids=positions, num_items_in_batch=1).loss
    alone = sum(model(one, one, num_items_in_batch=1).loss for one in (first, second))
    torch.testing.assert_close(together, torch.as_tensor(alone), rtol=1e-5, atol=1e-4)
    refuse_leaking_packs(model, 2048, torch.device("cpu"))


def test_an_architecture_that_lets_packed_documents_meet_is_refused() -> None:
    model = build().eval()
    decoder = model.peft.get_base_model().get_decoder()
    whole = decoder.forward
    decoder.forward = lambda **options: whole(**{**options, "position_ids": None})
    with pytest.raises(NotRunnableError, match="does not keep packed documents apart"):
        refuse_leaking_packs(model, 2048, torch.device("cpu"))


def test_an_adapter_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    model = build()
    model.save_adapter(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    other = build()
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    other.load_adapter(tmp_path)
    for (name, mine), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    with pytest.raises(CheckpointError, match="is another adapter"):
        build(target_modules=("q_proj", "lm_head")).load_adapter(tmp_path)


def test_modules_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="no adapter can be added"):
        build(target_modules=("nothing",))


class _Older:
    """A model of a transformers that has no newer name for it."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def gradient_checkpointing_enable(self, options: dict[str, bool]) -> None:
        self.asked.append(options)


class _Old(_Older):
    def gradient_checkpointing_enable(
        self, options: dict[str, bool], every_n_layers: int = 1, offload: bool = False
    ) -> None:
        self.asked.append((options, offload))


def test_older_releases_of_transformers_recompute_layers_too() -> None:
    older, old = _Older(), _Old()
    peft_model._recompute_layers(older, offload=False)
    peft_model._recompute_layers(old, offload=True)
    assert older.asked == [{"use_reentrant": False}]
    assert old.asked == [({"use_reentrant": False}, True)]


def test_a_release_that_cannot_offload_says_so() -> None:
    with pytest.raises(NotRunnableError, match="on the host") as raised:
        peft_model._recompute_layers(_Older(), offload=True)
    assert "transformers>=5.17" in str(raised.value.remedy)
