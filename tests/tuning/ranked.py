"""What each of two ranks does for test_distributed.py; writes what it found as JSON.

RANK=0 WORLD_SIZE=2 ... python -m tests.tuning.ranked FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from oomproof.errors import OomproofError
from oomproof.memory.training_shape import Kept
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.tuning.distributed import ALONE, Ranks, from_environment
from oomproof.tuning.model import (
    LoraSettings,
    TrainingModel,
    TrainingOptions,
    build_training_model,
)

CPU = torch.device("cpu")
TINY = bundled_folder()
SPEC = resolve(str(TINY))
LORA = LoraSettings(rank=4, alpha=16.0)


def built(
    ranks: Ranks, *, seed: int = 0, made_up: bool = False, lora: LoraSettings = LORA, **options: Any
) -> TrainingModel:
    """The bundled model, with adapters that do something."""
    shaped = {"tokens": 128, "kept": Kept(attention=2, mid=1), **options}
    model = build_training_model(
        SPEC,
        None if made_up else TINY,
        lora,
        device=CPU,
        compute_dtype=torch.float32,
        options=TrainingOptions(**shaped),
        seed=seed,
        ranks=ranks,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    return model


def batch(step: int) -> torch.Tensor:
    """Of all ranks: a row for each."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, SPEC.vocab_size, (2, 40), generator=generator)


def own(ranks: Ranks, step: int) -> torch.Tensor:
    return batch(step)[ranks.rank : ranks.rank + 1]


def flat(model: TrainingModel) -> torch.Tensor:
    return torch.cat([one.grad.reshape(-1) for one in model.parameters() if one.grad is not None])


def error_of(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def told(act: Callable[[], object]) -> str:
    """How it fails."""
    try:
        act()
    except OomproofError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def against_one_process(ranks: Ranks, found: dict[str, Any]) -> None:
    model, alone = built(ranks), built(ALONE)
    for step in range(2):
        model(own(ranks, step), own(ranks, step)).loss.backward()
        alone(batch(step), batch(step)).loss.backward()
    found["against_one_process"] = error_of(flat(model), flat(alone))
    # As Trainer counts: labels of all ranks, and the loss times their number.
    model.zero_grad()
    ids, labels = own(ranks, 5), own(ranks, 5).clone()
    labels[:, : 10 * ranks.rank] = -100
    count = 39 + 30
    (model(ids, labels, num_items_in_batch=torch.tensor(count)).loss * ranks.size).backward()
    both, wanted = batch(5), batch(5).clone()
    wanted[1, :10] = -100
    alone.zero_grad()
    alone(both, wanted).loss.backward()
    found["uneven_labels"] = error_of(flat(model), flat(alone))


def accumulated(ranks: Ranks, found: dict[str, Any]) -> None:
    from accelerate import Accelerator

    model = built(ranks)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    found["wrapped"] = prepared is not model
    for step in range(3):
        model(own(ranks, step), own(ranks, step)).loss.backward()
    each = flat(model)
    model.zero_grad()
    for step in range(2):
        with accelerator.no_sync(prepared):
            model(own(ranks, step), own(ranks, step)).loss.backward()
    grads = flat(model)
    found["unsynced"] = digest(grads)
    model(own(ranks, 2), own(ranks, 2)).loss.backward()
    found["no_sync"] = error_of(flat(model), each)
    # Somebody's own gradients take part like any others.
    model.zero_grad()
    for step in range(3):
        for one in model.parameters():
            one.grad = None if one.grad is None else one.grad.clone()
        first = next(iter(model.parameters()))
        if step == 0:
            first.grad = torch.zeros_like(first)
        model(own(ranks, step), own(ranks, step)).loss.backward()
    found["foreign"] = error_of(flat(model), each)


def digest(numbers: torch.Tensor) -> str:
    return sha256(numbers.detach().numpy().tobytes()).hexdigest()


def trained(model: TrainingModel, ranks: Ranks) -> tuple[list[float], str]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(3):
        loss = model(own(ranks, step), own(ranks, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        with torch.no_grad():  # as an evaluation between steps
            losses.append(float(model(own(ranks, 9), own(ranks, 9)).loss))
    return losses, digest(model._adapters.values)


def sharded(ranks: Ranks, found: dict[str, Any]) -> None:
    cases: dict[str, dict[str, Any]] = {
        "file": {},
        "made up": {"made_up": True},
        "offloaded": {"offload_checkpoints": True, "format": "int4"},
    }
    for name, options in cases.items():
        plain = built(ranks, **options)
        shared = built(ranks, sharded=True, **options)
        found[f"{name}: plain"] = trained(plain, ranks)
        found[f"{name}: sharded"] = trained(shared, ranks)
    for name, one in (("plain", plain), ("sharded", shared)):
        found[f"{name} bytes"] = one._core._model.memory.nbytes
        terms = one.memory()
        found[f"{name} planned"] = terms.weights + terms.gathered
    ticks: list[tuple[int, int]] = []
    build_training_model(
        SPEC,
        TINY,
        LORA,
        device=CPU,
        compute_dtype=torch.float32,
        options=TrainingOptions(tokens=64, sharded=True),
        progress=lambda done, total: ticks.append((done, total)),
        ranks=ranks,
    )
    found["progress"] = ticks
    # What is not given is torch's process group.
    found["by itself"] = build_training_model(
        SPEC,
        TINY,
        LORA,
        device=CPU,
        compute_dtype=torch.float32,
        options=TrainingOptions(tokens=64),
    ).ranks.size


def with_trainer(ranks: Ranks, found: dict[str, Any], folder: Path) -> None:
    """transformers' Trainer, as it is, and a loop of one process on the same samples."""
    from transformers import Trainer, TrainingArguments

    samples = [{"input_ids": batch(number)[0]} for number in range(12)]
    for number, sample in enumerate(samples):
        sample["labels"] = sample["input_ids"].masked_fill(torch.arange(40) < number, -100)

    def collated(some: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([one[name] for one in some]) for name in some[0]}

    class InOrder(Trainer):  # type: ignore[misc]  # transformers is untyped
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        label_names=["labels"],
    )
    model = built(ranks)
    trainer = InOrder(model=model, args=arguments, train_dataset=samples, data_collator=collated)
    trainer.model_accepts_loss_kwargs = True
    trainer.train()
    found["trainer wraps"] = trainer.model_wrapped is not model
    alone = built(ALONE)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 3)
        micros = [collated(samples[first : first + 2]) for first in (4 * step, 4 * step + 2)]
        count = sum(int((one["labels"][:, 1:] != -100).sum()) for one in micros)
        for one in micros:
            alone(**one, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found["trainer"] = error_of(model._adapters.values, alone._adapters.values)
    found["moved"] = error_of(model._adapters.values, built(ALONE)._adapters.values)


def refused(ranks: Ranks, found: dict[str, Any], folder: Path) -> None:
    found["seeds"] = told(lambda: built(ranks, seed=ranks.rank))
    found["tokens"] = told(lambda: built(ranks, tokens=128 + ranks.rank))
    found["kept"] = told(lambda: built(ranks, kept=Kept(attention=ranks.rank)))
    model = built(ranks)
    model.save_adapter(folder / f"saved-{ranks.rank}")
    with torch.no_grad():
        next(iter(model.parameters())).add_(ranks.rank)
    own_ranks, model.ranks = model.ranks, ALONE
    model.save_adapter(folder / f"other-{ranks.rank}")
    model.ranks = own_ranks
    found["loaded"] = told(lambda: model.load_adapter(folder / f"other-{ranks.rank}"))
    dist.barrier()
    found["loaded alike"] = told(lambda: model.load_adapter(folder / "saved-0"))
    torch.manual_seed(3)
    drops = built(ranks, lora=replace(LORA, dropout=0.5))
    torch.manual_seed(3)
    found["dropout"] = drops._core._drawn_seed()


def lost(ranks: Ranks, found: dict[str, Any]) -> None:
    """A rank that falls silent, and one that dies."""
    group = dist.new_group(timeout=timedelta(seconds=0.5))
    silent = built(replace(ranks, group=group), sharded=True)
    model = built(ranks)
    if ranks.rank == 1:
        time.sleep(1.5)
        print("rank 1 meets its end", file=sys.stderr)
        os._exit(3)
    for name, one in (("silent", silent), ("dead", model)):
        begin = time.monotonic()
        found[name] = told(lambda one=one: one(own(ranks, 0), own(ranks, 0)).loss.backward())  # type: ignore[misc]
        found[f"{name}_s"] = time.monotonic() - begin


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    ranks = from_environment("cpu", timeout_s=20)
    found: dict[str, Any] = {"rank": ranks.rank, "size": ranks.size}
    file = folder / f"found-{ranks.rank}.json"
    against_one_process(ranks, found)
    accumulated(ranks, found)
    sharded(ranks, found)
    with_trainer(ranks, found, folder)
    refused(ranks, found, folder)
    file.write_text(json.dumps(found))
    lost(ranks, found)
    file.write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main()
