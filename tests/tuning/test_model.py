"""A step of training: losses and gradients are transformers' with peft, whatever is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from oomproof.errors import InputError, NotRunnableError, PlanDoesNotFitError
from oomproof.memory.training_shape import Kept
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.tuning.model import LoraSettings, TrainingOptions, build_training_model
from oomproof.tuning.operators import drop
from tests.compat.checkpoints import random_checkpoint
from tests.models.configs import SMALL_CONFIGS, spec_of
from tests.tuning.models import (
    CPU,
    LORA,
    gradients,
    gradients_of_peft,
    largest_error,
    ours,
    theirs,
    tokens_of,
)

TINY = bundled_folder()
ALL = Kept(attention=5, mid=5, qkv=5, gate_up=5)
SOME = Kept(attention=2, mid=4, qkv=3, gate_up=1)


def compare(folder: Path, tmp_path: Path, lora: LoraSettings = LORA, **options: Any) -> None:
    model = ours(folder, lora, **options)
    ids = tokens_of(model.spec, 2, 50)
    labels = ids.clone()
    labels[0, :20] = -100
    labels[1, 30:] = -100
    peft = theirs(model, folder, tmp_path / "adapter")
    expected = peft(input_ids=ids, labels=labels).loss
    expected.backward()
    loss = model(ids, labels).loss
    loss.backward()
    assert loss.dtype is torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert largest_error(gradients(model), gradients_of_peft(peft)) < 2e-4


@pytest.mark.parametrize("format_name", ["bf16", "nf4-dq", "int4"])
@pytest.mark.parametrize("kept", [None, Kept(), SOME, ALL])
def test_losses_and_gradients_are_pefts_whatever_is_kept(
    kept: Kept | None, format_name: str, tmp_path: Path
) -> None:
    compare(TINY, tmp_path, kept=kept, format=format_name, loss_tokens=33)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "llama, tied",
        "llama, stretched",
        "granite",
        "mistral",
        "qwen2",
        "qwen2, sliding",
        "qwen2, yarn",
        "qwen3",
    ],
)
def test_families_train_as_with_peft(family: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", family, std=0.05)
    layers = resolve(str(folder)).num_hidden_layers
    compare(folder, tmp_path, kept=Kept(attention=layers, qkv=1, gate_up=layers))


def test_unquantized_weights_that_are_no_neighbours_are_multiplied_one_by_one(
    tmp_path: Path,
) -> None:
    folder = random_checkpoint(tmp_path / "model", "qwen2", std=0.05)
    compare(folder, tmp_path, format="bf16")


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("up_proj", "o_proj")])
def test_some_linears_alone_can_have_adapters(targets: tuple[str, ...], tmp_path: Path) -> None:
    compare(TINY, tmp_path, LoraSettings(rank=3, alpha=6.0, target_modules=targets))


def test_a_projection_that_is_larger_than_scratch_is_multiplied_in_slices(tmp_path: Path) -> None:
    model = ours(TINY, scratch_bytes=1)
    assert model.memory().scratch < 1024 * 256 * 4
    compare(TINY, tmp_path, scratch_bytes=1)


def test_offloaded_checkpoints_change_nothing() -> None:
    plain, away = ours(TINY), ours(TINY, offload_checkpoints=True)
    ids = tokens_of(plain.spec, 2, 40)
    for model in (plain, away, plain, away):
        model(ids, ids).loss.backward()
    assert largest_error(gradients(away), gradients(plain)) == 0
    assert away.memory().checkpoints < plain.memory().checkpoints


def test_packed_documents_do_not_see_each_other() -> None:
    model = ours(TINY)
    ids = tokens_of(model.spec, 2, 60)
    positions = torch.cat((torch.arange(25), torch.arange(35))).repeat(2, 1)
    labels = ids.clone()
    labels[:, 25] = -100  # nothing predicts a document's first token
    packed = model(ids, labels, positions).loss
    packed.backward()
    found = gradients(model)
    model.zero_grad()
    count = 2 * (24 + 34)
    total = torch.zeros(())
    for part in (ids[:, :25], ids[:, 25:]):
        loss = model(part, part, num_items_in_batch=count).loss
        loss.backward()
        total += loss.detach()
    assert float(packed.detach()) == pytest.approx(float(total), rel=1e-5)
    assert largest_error(found, gradients(model)) < 1e-4


def test_gradients_add_up_until_they_are_cleared() -> None:
    model = ours(TINY)
    ids = tokens_of(model.spec, 1, 30)
    model(ids, ids).loss.backward()
    once = gradients(model)
    model(ids, ids).loss.backward()
    assert largest_error(gradients(model), {name: 2 * one for name, one in once.items()}) < 1e-6
    model.zero_grad(set_to_none=False)
    model(ids, ids).loss.backward()
    assert largest_error(gradients(model), once) < 1e-6
    for parameter in model.parameters():  # somebody else's tensors, and none at all
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).grad = None
    model(ids, ids).loss.backward()
    name = next(iter(once))
    assert torch.allclose(gradients(model)[name], once[name])
    others = {key: one + 1 for key, one in once.items() if key != name}
    assert largest_error({key: gradients(model)[key] for key in others}, others) < 1e-6


def test_the_scale_of_a_loss_scales_its_gradients() -> None:
    model = ours(TINY)
    ids = tokens_of(model.spec, 1, 30)
    loss = model(ids, ids).loss
    (loss * 4).backward()
    scaled = gradients(model)
    model.zero_grad()
    divided = model(ids, ids, num_items_in_batch=torch.tensor(29 / 4)).loss
    divided.backward()
    assert float(divided.detach()) == pytest.approx(4 * float(loss.detach()), rel=1e-6)
    assert largest_error(gradients(model), scaled) < 1e-5


def test_a_scale_is_not_rounded_to_16_bits() -> None:
    model = ours(TINY, dtype=torch.bfloat16)
    ids = tokens_of(model.spec, 1, 30)
    model(ids, ids).loss.backward()
    whole = gradients(model)
    model.zero_grad()
    (model(ids, ids).loss / 3).backward()
    thirds = {name: one / 3 for name, one in whole.items()}
    assert largest_error(gradients(model), thirds) < 1e-6


def test_dropout_has_the_gradient_of_the_mask_that_was_drawn() -> None:
    model = ours(TINY, LoraSettings(rank=4, alpha=16.0, dropout=0.3), seed=5)
    ids = tokens_of(model.spec, 1, 40)

    def loss() -> torch.Tensor:
        torch.manual_seed(11)
        found: torch.Tensor = model(ids, ids).loss
        return found

    loss().backward()
    found = gradients(model)
    generator = torch.Generator().manual_seed(2)
    steps = {
        name: torch.randn(one.shape, generator=generator) for name, one in model.named_parameters()
    }
    slope = sum(float((found[name] * step).sum()) for name, step in steps.items())
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(steps[name], alpha=sign * 1e-3)
            ends.append(float(loss()))
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=0.02)
    masks = {float(model(ids, ids).loss.detach()) for _ in range(3)}
    assert len(masks) == 3
    model.eval()
    assert len({float(model(ids, ids).loss.detach()) for _ in range(2)}) == 1


def test_dropout_drops_the_share_that_was_asked_for() -> None:
    x, out = torch.ones(100, 200), torch.empty(100, 200)
    drop(x, 3, 0.25, out, False)
    assert float((out == 0).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(out.max()) == pytest.approx(1 / 0.75)
    assert float(out.mean()) == pytest.approx(1, abs=0.02)


def test_evaluating_keeps_nothing_and_gives_the_same_loss() -> None:
    model = ours(TINY)
    ids = tokens_of(model.spec, 2, 40)
    with torch.no_grad():
        still = model(ids, ids).loss
    loss = model(ids, ids).loss
    assert not still.requires_grad
    assert float(still) == pytest.approx(float(loss.detach()), rel=1e-6)


def test_a_loss_whose_activations_are_gone_is_refused() -> None:
    model = ours(TINY)
    ids = tokens_of(model.spec, 1, 10)
    first = model(ids, ids).loss
    second = model(ids, ids).loss
    with pytest.raises(RuntimeError, match="call backward"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward"):
        second.backward()


def test_a_batch_without_labels_has_no_loss_and_no_gradient() -> None:
    model = ours(TINY)
    ids = tokens_of(model.spec, 1, 10)
    loss = model(ids, torch.full_like(ids, -100)).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert not any(one.any() for one in gradients(model).values())


def test_losses_fall() -> None:
    model = ours(TINY, dtype=torch.bfloat16, format="nf4-dq")
    ids = tokens_of(model.spec, 2, 60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(ids, ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_only_adapters_are_parameters_by_pefts_names() -> None:
    names = [name for name, _ in ours(TINY).named_parameters()]
    assert len(names) == 5 * 7 * 2
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.model.layers.4.mlp.down_proj.lora_B.weight" in names


def test_random_weights_need_no_folder() -> None:
    model = build_training_model(
        resolve("tiny"),
        None,
        LORA,
        device=CPU,
        compute_dtype=torch.bfloat16,
        options=TrainingOptions(tokens=32),
    )
    ids = tokens_of(model.spec, 1, 20)
    assert bool(torch.isfinite(model(ids, ids).loss))


def test_batches_that_were_not_planned_are_refused() -> None:
    model = ours(TINY, tokens=64, positions=32)
    ids = tokens_of(model.spec, 2, 33)
    with pytest.raises(InputError, match=r"2 × 33 tokens"):
        model(ids, ids)
    with pytest.raises(InputError, match=r"1 × 40 tokens"):
        model(ids.view(1, -1)[:, :40], ids.view(1, -1)[:, :40])
    with pytest.raises(InputError, match="labels"):
        model(ids, ids[:1])


def test_values_beyond_the_tables_are_refused() -> None:
    model = ours(TINY, tokens=64, positions=16)
    ids = tokens_of(model.spec, 1, 16)
    wrong, far = ids.clone(), torch.arange(16)[None] + 1
    wrong[0, 3] = 2048
    with pytest.raises(InputError, match="input_ids has 2048, which is not from 0 to 2,047"):
        model(wrong, ids)
    with pytest.raises(InputError, match="labels has 2048"):
        model(ids, wrong)
    wrong[0, 3] = -1
    with pytest.raises(InputError, match="labels has -1"):
        model(ids, wrong)
    with pytest.raises(InputError, match="position_ids has 16, which is not from 0 to 15"):
        model(ids, ids, far)


def test_what_is_not_trained_here_is_refused_with_its_reason() -> None:
    for config in ("gemma2", "mixtral", "deepseek-v3"):
        spec = spec_of(SMALL_CONFIGS[config])
        with pytest.raises(NotRunnableError, match="cannot be trained"):
            build_training_model(
                spec,
                None,
                LORA,
                device=CPU,
                compute_dtype=torch.float32,
                options=TrainingOptions(tokens=8),
            )
    for format_name in ("int8", "fp8"):
        with pytest.raises(NotRunnableError, match=format_name):
            ours(TINY, format=format_name)
    with pytest.raises(InputError, match="float16"):
        ours(TINY, dtype=torch.float16)
    with pytest.raises(InputError, match="flash attention computes"):
        ours(TINY, attention="flash")


def test_a_limit_is_spent_on_activations_or_refused() -> None:
    least = ours(TINY, kept=Kept()).memory().peak_bytes
    model = ours(TINY, limit_bytes=least + 1_000_000)
    assert model.memory().peak_bytes <= least + 1_000_000
    assert model.shape.kept.attention == 5
    with pytest.raises(PlanDoesNotFitError, match="the limit is"):
        ours(TINY, limit_bytes=least - 1)
    with pytest.raises(InputError, match="both"):
        ours(TINY, limit_bytes=least, kept=Kept())


def test_a_model_stays_where_its_parameters_are_views_of_one_tensor() -> None:
    model = ours(TINY)
    assert model.to("cpu:0") is model
    assert model.float() is model
    place = model._adapters.values.untyped_storage().data_ptr()
    assert all(one.untyped_storage().data_ptr() == place for one in model.parameters())
    for move in (model.half, lambda: model.to("meta")):
        with pytest.raises(InputError, match="build it there"):
            move()
