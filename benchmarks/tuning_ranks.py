"""Training on several GPUs of one machine: batches shared, and the base shared too.

    torchrun --nproc-per-node 2 -m benchmarks.tuning --rows ranks > results.jsonl

An 8B on each GPU by itself, then with averaged gradients, then with a base that the ranks share,
then a 70B that they share. Losses of the shared base are compared with those of the whole one.
Peaks and NCCL's memory are of every rank, in their order; the first one prints. A row that fails on
all ranks is reported, and the rest goes on.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from benchmarks.rehearsals import machine
from benchmarks.tuning import (
    LORA,
    VOCAB,
    Row,
    Rows,
    free,
    optimizer_of,
    repeated,
    say,
    shape_for,
    spec_of,
    timed,
)
from oomproof.formats import DType
from oomproof.memory.training import TrainingTerms, sharding_of, training_memory
from oomproof.memory.training_shape import TrainingShape
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.models.spec import ModelSpec
from oomproof.tuning.distributed import ALONE, Ranks, from_environment, leave
from oomproof.tuning.frozen import FrozenModel
from oomproof.tuning.model import training_model_on

TIMEOUT_S = 120.0
"""Of each meeting: a rank that failed alone ends the others so soon."""
ROW = Row(batch=1, sequence=2048)
PLANNED = (
    ("8b alone", "llama-3.1-8b", 1, False),
    ("8b data parallel", "llama-3.1-8b", 2, False),
    ("8b sharded", "llama-3.1-8b", 2, True),
    ("70b sharded", "llama-3.1-70b", 2, True),
)
"""Row, model, ranks, whether they share the base: what `check` tells of."""


def shape_of_ranks(spec: ModelSpec, ranks: int, *, sharded: bool) -> TrainingShape:
    return replace(shape_for(spec, ROW), ranks=ranks, sharded=sharded)


def outside_bytes() -> int:
    """Memory of this GPU that torch's allocator does not hold."""
    left, total = torch.cuda.mem_get_info()
    return total - left - torch.cuda.memory_reserved()


def of_all(ranks: Ranks, value: Any) -> list[Any]:
    """Everybody's, in their order."""
    if ranks.size == 1:
        return [value]
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, value)
    return found


def load(
    spec: ModelSpec, ranks: Ranks, *, sharded: bool, folder: Path | None = None
) -> FrozenModel:
    begin = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        frozen = FrozenModel(spec, "nf4-dq", DType.BFLOAT16, device, ranks=ranks, sharded=sharded)
        frozen.load(folder, seed=0)
    figures = {
        "seconds": round(time.perf_counter() - begin, 1),
        "held_gb": frozen.memory.nbytes / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    free()
    told(ranks, row=f"{spec.id} loaded", sharded=sharded, of_ranks=of_all(ranks, figures))
    return frozen


def told(ranks: Ranks, **figures: object) -> None:
    """From the first rank of the run, whoever computes."""
    if int(os.environ["RANK"]) == 0:
        say(ranks=ranks.size, **figures)


def speed(
    spec: ModelSpec, frozen: FrozenModel, name: str, *, steps: int, first_outside: int
) -> None:
    """Steps, optimizer included, and what they take."""
    ranks = frozen.ranks
    shape = shape_of_ranks(spec, ranks.size, sharded=frozen.sharded is not None)
    torch.cuda.reset_peak_memory_stats()
    model = training_model_on(frozen, spec, LORA, shape)
    optimizer = optimizer_of("adamw", list(model.parameters()))
    torch.manual_seed(ranks.rank)
    ids = torch.randint(5, VOCAB, (ROW.batch, ROW.sequence), device="cuda")

    def step() -> None:
        model(ids, ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = timed(step, count=steps)
    terms = model.memory()
    peak = torch.cuda.max_memory_allocated()
    figures = {
        "s_per_step": found["s"],
        "launch_s": found["launch_s"],
        "peak_gb": peak / 1e9,
        "planned_over_measured": terms.allocated_bytes / peak,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        # NCCL's, and modules that were loaded since.
        "outside_torch_gb": (outside_bytes() - first_outside) / 1e9,
    }
    listed = of_all(ranks, figures)
    slowest = max(one["s_per_step"] for one in listed)
    told(
        ranks,
        row=name,
        model=spec.id,
        sharded=shape.is_sharded,
        batch=ROW.batch,
        sequence=ROW.sequence,
        tokens_per_second=ranks.size * ROW.batch * ROW.sequence / slowest,
        of_ranks=listed,
        **planned(terms),
    )


def planned(terms: TrainingTerms) -> dict[str, object]:
    return {
        "planned_gb": terms.allocated_bytes / 1e9,
        "planned_comm_gb": terms.comm / 1e9,
        "terms_gb": {key: round(getattr(terms, key) / 1e9, 3) for key in terms.__slots__},
    }


def losses(spec: ModelSpec, frozen: FrozenModel) -> list[float]:
    """Of some steps, on other data for each rank; and the sum of all adapters at the end.

    Without flash attention, whose gradients are not the same twice.
    """
    ranks = frozen.ranks
    shape = shape_of_ranks(spec, ranks.size, sharded=frozen.sharded is not None)
    model = training_model_on(frozen, spec, LORA, shape, attention="plain")
    optimizer = optimizer_of("adamw", list(model.parameters()), rate=1e-3)
    found = []
    for number, made in enumerate(repeated(2, 512, 5 * ranks.size)):
        if number % ranks.size != ranks.rank:
            continue
        ids = made.to(model.device) % spec.vocab_size
        loss = model(ids, ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    adapters = sum(one.detach().double().sum() for one in model.parameters())
    return [*map(float, found), float(adapters)]


def compare(name: str, ranks: Ranks, one: list[float] | None, other: list[float] | None) -> None:
    """Losses of all ranks; their first one, before any gradient, is the same to the bit."""
    if one is None or other is None:
        return
    listed = of_all(ranks, (one, other))
    told(
        ranks,
        row=name,
        first_loss_is_equal=all(a[0] == b[0] for a, b in listed),
        all_equal=all(a == b for a, b in listed),
        largest_difference=max(
            abs(x - y) for a, b in listed for x, y in zip(a[:-1], b[:-1], strict=True)
        ),
        adapters_are_alike=len({a[-1] for a, _ in listed}) == len({b[-1] for _, b in listed}) == 1,
    )


def travel(ranks: Ranks, spec: ModelSpec) -> None:
    """How long a layer takes to come together, and a bucket of gradients to be added up."""
    cut = sharding_of(spec, shape_of_ranks(spec, ranks.size, sharded=True))
    assert cut is not None
    into = torch.empty(cut.gathered_bytes, dtype=torch.uint8, device="cuda")
    part, grads = into[: cut.part_bytes].clone(), torch.zeros(6 << 20, device="cuda")
    for name, act in (
        ("gather a layer", lambda: ranks.gather(into, part).wait()),
        ("add up 25 MB", lambda: ranks.sum(grads).wait()),
    ):
        found = timed(act, warm=5, count=20)
        size = cut.gathered_bytes - cut.part_bytes if name.startswith("gather") else grads.nbytes
        told(
            ranks,
            row=name,
            model=spec.id,
            us=1e6 * found["s"],
            launch_us=1e6 * found["launch_s"],
            gb_per_s=size / found["s"] / 1e9,
        )


def eight(rows: Rows, ranks: Ranks, before: int) -> None:
    """An 8B: each alone, together, and on a base that they share."""
    spec = spec_of("llama-3.1-8b")
    frozen = rows.run("load 8b", partial(load, spec, ALONE, sharded=False))
    whole = again = None
    if frozen is not None:
        run = partial(speed, spec, frozen, steps=8, first_outside=before)
        rows.run("8b alone", partial(run, "8b alone"))
        frozen.ranks = ranks
        rows.run("8b data parallel", partial(run, "8b data parallel"))
        whole = rows.run("whole", partial(losses, spec, frozen))
        again = rows.run("whole again", partial(losses, spec, frozen))
        frozen.memory.untyped_storage().resize_(0)
        del run
    free()
    frozen = rows.run("load 8b sharded", partial(load, spec, ranks, sharded=True))
    if frozen is None:
        return
    run = partial(speed, spec, frozen, steps=8, first_outside=before)
    rows.run("8b sharded", partial(run, "8b sharded"))
    shared = rows.run("shared", partial(losses, spec, frozen))
    compare("losses, whole twice", ranks, whole, again)
    compare("losses, whole and shared", ranks, whole, shared)
    frozen.memory.untyped_storage().resize_(0)


def from_file(rows: Rows, ranks: Ranks) -> None:
    """The bundled model, read from its file: whole, and each rank a share of it."""
    folder = bundled_folder()
    spec = resolve(str(folder))
    found = []
    for name, sharded in (("tiny whole", False), ("tiny shared", True)):
        frozen = load(spec, ranks, sharded=sharded, folder=folder)
        found.append(rows.run(name, partial(losses, spec, frozen)))
    compare("losses of a file, whole and shared", ranks, *found)


def seventy(rows: Rows, ranks: Ranks, before: int) -> None:
    """A 70B that they share."""
    spec = spec_of("llama-3.1-70b")
    rows.run("travel", partial(travel, ranks, spec))
    frozen = rows.run("load 70b", partial(load, spec, ranks, sharded=True))
    if frozen is not None:
        run = partial(speed, spec, frozen, "70b sharded", steps=4, first_outside=before)
        rows.run("70b sharded", run)


def check() -> None:
    """What is planned for every row, without a GPU."""
    for name, model, ranks, sharded in PLANNED:
        spec = spec_of(model)
        terms = training_memory(spec, shape_of_ranks(spec, ranks, sharded=sharded))
        say(row=name, ranks=ranks, **planned(terms))


@record
def main() -> int:
    """Prints the rows; torchrun shows the traceback of the rank that failed first."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
        torch.zeros(1, device="cuda")  # the context, which is not NCCL's
    before = outside_bytes()
    ranks = from_environment(timeout_s=TIMEOUT_S)
    if ranks.size == 1:
        say(row="ranks", skipped="start with torchrun --nproc-per-node 2")
        return 1
    numbers = torch.zeros(1 << 20, device="cuda")
    for _ in range(2):
        ranks.sum(numbers).wait()
        ranks.gather(numbers, numbers[: len(numbers) // ranks.size].clone()).wait()
        ranks.trade(torch.empty_like(numbers), numbers)
    torch.cuda.synchronize()
    del numbers
    if ranks.is_first:
        say(row="machine", **machine())
    met = [one / 1e9 for one in of_all(ranks, outside_bytes() - before)]
    told(ranks, row="nccl", version=torch.cuda.nccl.version(), outside_torch_gb=met)
    rows = Rows(budget_s=float("inf"))
    rows.run("from a file", partial(from_file, rows, ranks))
    eight(rows, ranks, before)
    free()
    seventy(rows, ranks, before)
    leave(ranks)
    return 0
