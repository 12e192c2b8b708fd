"""Smaller batches for those who stay with transformers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import oomproof
from oomproof.errors import InputError, LadderExhaustedError
from tests.guarding.engines import accelerator_error, exact_model, out_of_memory

LARGE = 5


def test_the_batch_shrinks_until_it_fits_and_stays_there() -> None:
    seen: list[int] = []

    @oomproof.executable_batch_size(starting_batch_size=20)
    def train(batch_size: int, note: str, *, times: int) -> str:
        """Trains."""
        seen.append(batch_size)
        if batch_size > LARGE:
            raise out_of_memory()
        return note * times

    assert train("a", times=2) == "aa"
    assert seen == [20, 10, 5]
    assert train("b", times=1) == "b"
    assert seen == [20, 10, 5, 5]
    assert train.__doc__ == "Trains."


def test_there_is_a_floor() -> None:
    @oomproof.executable_batch_size(starting_batch_size=8, floor=3)
    def never(batch_size: int) -> None:
        raise out_of_memory()

    with pytest.raises(LadderExhaustedError, match="batch size 8; batch size 4; batch size 3:"):
        never()
    with pytest.raises(InputError, match="floor 9"):
        oomproof.executable_batch_size(lambda size: size, starting_batch_size=8, floor=9)


@pytest.mark.parametrize(
    "trouble", [accelerator_error(700, "illegal access"), ValueError("a bug")], ids=str
)
def test_what_is_not_for_want_of_memory_is_raised_at_once(trouble: Exception) -> None:
    calls: list[int] = []

    @oomproof.executable_batch_size
    def broken(batch_size: int) -> None:
        calls.append(batch_size)
        raise trouble

    with pytest.raises(type(trouble)) as raised:
        broken()
    assert raised.value is trouble
    assert calls == [128]


def test_the_failed_calls_tensors_are_gone_before_the_next_one() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    @oomproof.executable_batch_size(starting_batch_size=4)
    def greedy(batch_size: int) -> int:
        assert all(one() is None for one in held)
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        if batch_size > 1:
            raise out_of_memory()
        return batch_size

    assert greedy() == 1
    assert len(held) == 3


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bundled model, which has no memory for more than two prompts at once."""
    model = exact_model()
    original = type(model).forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        if options["input_ids"].shape[0] > 2:
            raise out_of_memory()
        return original(self, *arguments, **options)

    forward.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", forward)
    return model


def test_generate_goes_on_in_halves_and_gives_what_the_whole_would(crowded: nn.Module) -> None:
    prompts = torch.arange(40, 60).view(5, 4)
    asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    model: Any = crowded
    mask = torch.ones_like(prompts)
    rows = [model.generate(row[None], attention_mask=mask[:1], **asked)[0] for row in prompts]
    whole = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    with pytest.raises(torch.OutOfMemoryError):
        model.generate(prompts, attention_mask=mask, **asked)
    with oomproof.guard(model) as same:
        assert same is model
        found = model.generate(prompts, attention_mask=mask, **asked)
    assert found.shape[0] == 5
    assert torch.equal(found[:, : whole.shape[1]], whole) or found.shape == whole.shape
    assert "generate" not in vars(model)
    with oomproof.guard(model, floor=3), pytest.raises(LadderExhaustedError, match="batch of 5"):
        model.generate(prompts, attention_mask=mask, **asked)
    gc.collect()
    with pytest.raises(InputError), oomproof.guard(model, floor=0):
        pass
