"""QLoRA beside transformers + peft + bitsandbytes: peak memory, speed and losses on one GPU.

    python -m benchmarks.tuning [--rows ours,peer,curve,70b,profile] [--out DIR] > results.jsonl

Llama 3.1's shapes with random weights made on the device, the same for both sides: rank 16 on all
linears of nf4-dq weights. A row is a batch, a sequence and what of ours is varied: its peak is
torch.cuda.max_memory_allocated, its speed the median of timed steps, optimizer included, after
some to warm up; ours are listed with the plan's peak. `curve` trains both on the same data from the
same adapters, each twice, and the peer without its float32 copies too: some batches over and over,
and ever new text of a random language. Profiles go to files. A row that fails is reported, and the
rest goes on. `--rows ranks`, started by torchrun, is benchmarks/tuning_ranks.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.rehearsals import machine
from oomproof.formats import DType
from oomproof.loading.random_weights import Noise
from oomproof.memory.training import kept_within, training_memory
from oomproof.memory.training_shape import Kept, TrainingShape
from oomproof.models.catalog import find
from oomproof.models.spec import ModelSpec, Role
from oomproof.tuning.frozen import FrozenModel
from oomproof.tuning.model import LoraSettings, TrainingModel, training_model_on

LORA = LoraSettings(rank=16, alpha=32.0)
WARM, TIMED = 3, 8
VOCAB = 100_000
PROFILED = ("b1 in 9 GB", "b4 in 13 GB")
GROUPS = ("ours", "peer", "curve", "profile", "70b")
COMPARED = (
    ("ours", "ours again"),
    ("the peer", "the peer again"),
    ("ours", "the peer"),
    ("the peer in 16 bits", "the peer"),
)
"""The first two are noise, which the others are measured by."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One of ours."""

    batch: int
    sequence: int
    limit_gb: float | None = None
    """Of the peak: what is left is spent on kept activations. None for `kept`."""
    kept: Kept | None = None
    """None for attention's output in every layer."""
    attention: str = "auto"
    offload: bool = False
    scratch_mib: int = 256
    optimizer: str = "adamw"
    documents: int = 0
    """Documents packed into a sequence; 0 for one."""


ROWS = {
    "b1 in 9 GB": Row(batch=1, sequence=2048, limit_gb=9),
    "b4 in 13 GB": Row(batch=4, sequence=2048, limit_gb=13),
    "8k in 13 GB": Row(batch=1, sequence=8192, limit_gb=13),
    "b1": Row(batch=1, sequence=2048),
    "b1 flash": Row(batch=1, sequence=2048, attention="flash"),
    "64 tokens": Row(batch=1, sequence=64),
    "b1 nothing kept": Row(batch=1, sequence=2048, kept=Kept()),
    "b1 all kept": Row(batch=1, sequence=2048, limit_gb=60),
    "b1 offloaded": Row(batch=1, sequence=2048, offload=True),
    "b1 scratch 64 MiB": Row(batch=1, sequence=2048, scratch_mib=64),
    "b1 8-bit paged": Row(batch=1, sequence=2048, optimizer="adamw-paged"),
    "b1 packed": Row(batch=1, sequence=2048, documents=7),
    "b4 flash": Row(batch=4, sequence=2048, attention="flash", limit_gb=13),
    "b4 nothing kept": Row(batch=4, sequence=2048, kept=Kept()),
    "b4 all kept": Row(batch=4, sequence=2048, limit_gb=90),
    "b4 all kept flash": Row(batch=4, sequence=2048, limit_gb=90, attention="flash"),
    "b4 offloaded": Row(batch=4, sequence=2048, offload=True),
    "8k flash": Row(batch=1, sequence=8192, limit_gb=13, attention="flash"),
}
ROWS_70B = {
    "70b in 48 GB": Row(batch=1, sequence=2048, limit_gb=48),
    "70b offloaded": Row(batch=1, sequence=2048, offload=True),
}
PEER = ((1, 2048), (4, 2048), (1, 8192))


def say(**figures: object) -> None:
    print(json.dumps({"benchmark": "tuning", **figures}), flush=True)


def free() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def spec_of(name: str) -> ModelSpec:
    entry = find(name)
    assert entry is not None
    return entry.spec()


def frozen_of(spec: ModelSpec) -> FrozenModel:
    begin = time.perf_counter()
    with torch.no_grad():
        model = FrozenModel(spec, "nf4-dq", DType.BFLOAT16, torch.device("cuda", 0))
        model.load(None, seed=0)
    free()
    say(
        row=f"{spec.id} loaded",
        seconds=round(time.perf_counter() - begin, 1),
        allocated_gb=torch.cuda.memory_allocated() / 1e9,
        weights_gb=model.memory.nbytes / 1e9,
    )
    return model


def optimizer_of(name: str, parameters: list[torch.nn.Parameter], rate: float = 1e-4) -> Any:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, fused=True)
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(parameters, lr=rate)


def shape_for(spec: ModelSpec, row: Row) -> TrainingShape:
    shape = TrainingShape(
        tokens=row.batch * row.sequence,
        positions=row.sequence,
        sequences=row.batch * max(1, row.documents),
        kept=row.kept or Kept(attention=spec.num_hidden_layers),
        offload_checkpoints=row.offload,
        scratch_bytes=row.scratch_mib << 20,
    )
    if row.limit_gb is None:
        return shape
    return kept_within(spec, shape, int(row.limit_gb * 1e9), optimizer=row.optimizer)


def timed(step: Callable[[], object], warm: int = WARM, count: int = TIMED) -> dict[str, float]:
    """Seconds of a step, and how long it takes to launch."""
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    seconds, launches = [], []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        launches.append(launched - begin)
    return {"s": statistics.median(seconds), "launch_s": statistics.median(launches)}


def positions_of(row: Row) -> torch.Tensor | None:
    if not row.documents:
        return None
    each = -(-row.sequence // row.documents)
    return (torch.arange(row.sequence) % each).repeat(row.batch, 1)


def ours(spec: ModelSpec, frozen: FrozenModel, name: str, row: Row) -> None:
    shape = shape_for(spec, row)
    torch.cuda.reset_peak_memory_stats()
    begun = torch.cuda.memory_allocated() - frozen.memory.nbytes
    model = training_model_on(frozen, spec, LORA, shape, attention=row.attention)
    optimizer = optimizer_of(row.optimizer, list(model.parameters()))
    ids = torch.randint(5, VOCAB, (row.batch, row.sequence), device="cuda")
    positions = positions_of(row)

    def step() -> None:
        model(ids, ids, positions).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    short = row.sequence * row.batch > 2048 and row.limit_gb is None
    count = TIMED // 2 if short else TIMED
    found = timed(step, count=count)
    terms = model.memory(row.optimizer)
    peak = torch.cuda.max_memory_allocated()
    say(
        row=name,
        side="ours",
        model=spec.id,
        batch=row.batch,
        sequence=row.sequence,
        attention=row.attention,
        optimizer=row.optimizer,
        kept={key: getattr(shape.kept, key) for key in Kept.__slots__},
        s_per_step=found["s"],
        launch_s=found["launch_s"],
        tokens_per_second=row.batch * row.sequence / found["s"],
        peak_gb=peak / 1e9,
        planned_gb=terms.peak_bytes / 1e9,
        planned_over_measured=terms.peak_bytes / peak,
        reserved_gb=torch.cuda.max_memory_reserved() / 1e9,
        before_gb=begun / 1e9,
        terms={key: getattr(terms, key) for key in terms.__slots__},
    )


def peer_of(spec: ModelSpec, *, upcast: bool = True) -> Any:
    """The recipe: transformers, bitsandbytes and peft, with the same weights as ours.

    Args:
        spec: The model.
        upcast: Whether norms, embedding and head become float32, as peft's function makes them, and
            so the sum of all layers' updates.
    """
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {key: value for key, value in spec.config.items() if key != "architectures"}
    config = LlamaConfig(**{**fields, "dtype": "bfloat16", "use_cache": False})
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    device = torch.device("cuda", 0)
    tensors = {tensor.name: tensor for tensor in spec.tensors}
    largest = max(tensor.numel for tensor in spec.tensors)
    noise = Noise(device, torch.bfloat16, seed=0, largest=largest)
    for name in [name for name, _ in model.named_parameters()]:
        tensor = tensors[name]
        values = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
        if tensor.role is Role.NORM:
            values.fill_(1.0)
        else:
            noise.fill(values.view(-1), name, begin=0, numel=tensor.numel)
        path, _, leaf = name.rpartition(".")
        if tensor.role is Role.LINEAR:
            linear = bnb.nn.Linear4bit(
                tensor.shape[1],
                tensor.shape[0],
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=True,
                device="meta",
            )
            linear.weight = bnb.nn.Params4bit(
                values, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            outer, _, last = path.rpartition(".")
            setattr(model.get_submodule(outer), last, linear)
        else:
            setattr(model.get_submodule(path), leaf, torch.nn.Parameter(values))
        del values
    rotary = type(model.model.rotary_emb)(config=config)
    model.model.rotary_emb = rotary.to(device)
    checkpointing = {"use_reentrant": False}
    if upcast:
        model.is_loaded_in_4bit = True  # else peft skips checkpointing
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=True,
            gradient_checkpointing_kwargs=checkpointing,
        )
    else:
        model.requires_grad_(False)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    settings = LoraConfig(
        r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, settings)
    model.train()
    assert model.base_model.model.is_gradient_checkpointing
    free()
    return model


def peer(spec: ModelSpec, model: Any, batch: int, sequence: int) -> None:
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = optimizer_of("adamw-paged", parameters)
    ids = torch.randint(5, VOCAB, (batch, sequence), device="cuda")
    torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = timed(step)
    say(
        row=f"peer b{batch} {sequence}",
        side="transformers + peft + bitsandbytes",
        model=spec.id,
        batch=batch,
        sequence=sequence,
        optimizer="adamw-paged",
        s_per_step=found["s"],
        launch_s=found["launch_s"],
        tokens_per_second=batch * sequence / found["s"],
        peak_gb=torch.cuda.max_memory_allocated() / 1e9,
        reserved_gb=torch.cuda.max_memory_reserved() / 1e9,
    )


def repeated(batch: int, sequence: int, count: int = 20) -> list[torch.Tensor]:
    """Five batches of noise over and over, to be learnt by heart."""
    generator = torch.Generator().manual_seed(7)
    made = torch.randint(5, WORDS, (5, batch, sequence), generator=generator)
    return [made[number % len(made)] for number in range(count)]


def fresh(batch: int, sequence: int, count: int = 40) -> list[torch.Tensor]:
    """Ever new text of a language in which each word has but some words that follow it."""
    generator = torch.Generator().manual_seed(8)
    following = torch.randint(5, WORDS, (WORDS, FOLLOWING), generator=generator)
    # The first ones more often.
    likely = 1 / torch.arange(1, FOLLOWING + 1, dtype=torch.float64)
    made = torch.empty(count * batch, sequence, dtype=torch.int64)
    word = torch.randint(5, WORDS, (len(made),), generator=generator)
    for place in range(sequence):
        made[:, place] = word
        drawn = torch.multinomial(likely, len(made), replacement=True, generator=generator)
        word = following[word, drawn]
    return list(made.view(count, batch, sequence))


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What both sides are trained on."""

    batches: Callable[[int, int], list[torch.Tensor]]
    rate: float
    batch: int = 2
    sequence: int = 512


WORDS, FOLLOWING = 3000, 8
LESSONS = {
    "repeated": Lesson(batches=repeated, rate=1e-3),
    "fresh": Lesson(batches=fresh, rate=2e-4),
}
Curves = dict[tuple[str, str], list[float]]
"""(lesson, who) → losses of its steps."""


def curve(
    step: Callable[[torch.Tensor], torch.Tensor],
    parameters: list[torch.nn.Parameter],
    lesson: Lesson,
) -> list[float]:
    optimizer = optimizer_of("adamw", parameters, rate=lesson.rate)
    losses = []
    for made in lesson.batches(lesson.batch, lesson.sequence):
        ids = made.to("cuda")
        loss = step(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def our_curve(spec: ModelSpec, frozen: FrozenModel, lesson: Lesson) -> list[float]:
    shape = shape_for(spec, Row(batch=lesson.batch, sequence=lesson.sequence))
    model = training_model_on(frozen, spec, LORA, shape)
    return curve(lambda ids: model(ids, ids).loss, list(model.parameters()), lesson)


def adapters_of(spec: ModelSpec, frozen: FrozenModel) -> dict[str, torch.Tensor]:
    shape = shape_for(spec, Row(batch=1, sequence=64))
    model: TrainingModel = training_model_on(frozen, spec, LORA, shape)
    return {name: value.detach().cpu() for name, value in model.named_parameters()}


def peer_curve(model: Any, adapters: dict[str, torch.Tensor], lesson: Lesson) -> list[float]:
    found = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(adapters[name.replace(".default", "")])
            found += 1
    assert found == len(adapters), (found, len(adapters))

    def step(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return curve(step, [one for one in model.parameters() if one.requires_grad], lesson)


def compare(curves: Curves) -> None:
    """Says how far apart they are, and whether that is more than noise."""
    for lesson in LESSONS:
        means = {}
        for one, other in COMPARED:
            if (lesson, one) not in curves or (lesson, other) not in curves:
                continue
            pair = curves[lesson, one], curves[lesson, other]
            differences = [a - b for a, b in zip(*pair, strict=True)]
            sizes = [abs(difference) for difference in differences]
            means[one, other] = statistics.fmean(sizes)
            noise = [means[twice] for twice in COMPARED[:2] if twice in means]
            judged = (one, other) not in COMPARED[:2] and len(noise) == 2
            say(
                row=f"curve, {lesson}: {one} and {other}",
                first=[round(loss, 5) for loss in pair[0]],
                second=[round(loss, 5) for loss in pair[1]],
                largest_difference=max(sizes),
                mean_difference=means[one, other],
                mean_signed_difference=statistics.fmean(differences),
                within_noise=means[one, other] <= 2 * max(noise) if judged else None,
            )


def profile(spec: ModelSpec, frozen: FrozenModel, name: str, row: Row, out: Path) -> None:
    """The kernels that a step's time goes to, in a file."""
    shape = shape_for(spec, row)
    model = training_model_on(frozen, spec, LORA, shape, attention=row.attention)
    optimizer = optimizer_of(row.optimizer, list(model.parameters()))
    ids = torch.randint(5, VOCAB, (row.batch, row.sequence), device="cuda")

    def step() -> None:
        model(ids, ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as found:
        step()
        torch.cuda.synchronize()
    averages = found.key_averages()
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"tuning-{name.replace(' ', '-')}.txt"
    file.write_text(
        averages.table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=110)
        + "\n\n"
        + averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)
    )
    kernels = sorted(
        (
            (event.self_device_time_total / 1e3, event.count, event.key[:100])
            for event in averages
            if str(event.device_type).endswith("CUDA")
        ),
        reverse=True,
    )
    say(
        row=f"profile {name}",
        total_ms=sum(ms for ms, _, _ in kernels),
        launches=sum(count for _, count, _ in kernels),
        top=[{"ms": round(ms, 2), "count": n, "kernel": key} for ms, n, key in kernels[:25]],
        file=file.name,
    )


class Rows:
    """Runs rows as long as there is time; a failure is reported, and the next one comes."""

    def __init__(self, budget_s: float) -> None:
        self._end = time.monotonic() + budget_s

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """What the row returns; None where it failed or there was no time."""
        if time.monotonic() > self._end:
            say(row=name, skipped="no time left")
            return None
        begin = time.monotonic()
        result = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the rest goes on
            say(row=name, error=f"{type(error).__name__}: {error}"[:600])
            traceback.print_exc(file=sys.stderr)
        if not isinstance(result, FrozenModel):
            free()
        print(f"{name}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
        return result


def eight(rows: Rows, groups: set[str], only: list[str], out: Path) -> None:
    """Everything on an 8B: ours, then the peer's, for which ours makes room."""
    spec = spec_of("llama-3.1-8b")
    frozen = rows.run("load", partial(frozen_of, spec))
    if frozen is None:
        return
    for name, row in ROWS.items() if "ours" in groups else ():
        if not only or name in only:
            rows.run(name, partial(ours, spec, frozen, name, row))
    for name in PROFILED if "profile" in groups else ():
        rows.run(f"profile {name}", partial(profile, spec, frozen, name, ROWS[name], out))
    curves: Curves = {}
    adapters = None
    if "curve" in groups:
        adapters = rows.run("adapters", partial(adapters_of, spec, frozen))
        for name, lesson in LESSONS.items():
            for who in ("ours", "ours again"):
                losses = rows.run(f"{who}, {name}", partial(our_curve, spec, frozen, lesson))
                if losses:
                    curves[name, who] = losses
    frozen.memory.untyped_storage().resize_(0)
    free()
    if groups & {"peer", "curve"}:
        beside(rows, spec, groups, curves, adapters)
    compare(curves)


def beside(
    rows: Rows,
    spec: ModelSpec,
    groups: set[str],
    curves: Curves,
    adapters: dict[str, torch.Tensor] | None,
) -> None:
    """The peer's figures, and its losses beside ours."""
    for upcast, names in (
        (True, ("the peer", "the peer again")),
        (False, ("the peer in 16 bits",)),
    ):
        if not upcast and adapters is None:
            continue
        model = rows.run(f"load {names[0]}", partial(peer_of, spec, upcast=upcast))
        if model is None:
            continue
        for batch, sequence in PEER if upcast and "peer" in groups else ():
            rows.run(f"peer b{batch} {sequence}", partial(peer, spec, model, batch, sequence))
        if adapters is not None:
            for name, lesson in LESSONS.items():
                for who in names:
                    work = partial(peer_curve, model, adapters, lesson)
                    losses = rows.run(f"{who}, {name}", work)
                    if losses:
                        curves[name, who] = losses
        del model
        free()


def seventy(rows: Rows) -> None:
    """A 70B."""
    spec = spec_of("llama-3.1-70b")
    frozen = rows.run("load 70b", partial(frozen_of, spec))
    for name, row in ROWS_70B.items() if frozen is not None else ():
        rows.run(name, partial(ours, spec, frozen, name, row))


def check() -> None:
    """What is planned for every row, without a GPU."""
    for model, table in (("llama-3.1-8b", ROWS), ("llama-3.1-70b", ROWS_70B)):
        spec = spec_of(model)
        for name, row in table.items():
            shape = shape_for(spec, row)
            terms = training_memory(spec, shape, optimizer=row.optimizer)
            nothing = replace(shape, kept=Kept())
            least = training_memory(spec, nothing, optimizer=row.optimizer)
            say(
                row=name,
                kept={key: getattr(shape.kept, key) for key in Kept.__slots__},
                planned_gb=terms.peak_bytes / 1e9,
                nothing_kept_gb=least.peak_bytes / 1e9,
                terms_gb={key: round(getattr(terms, key) / 1e9, 3) for key in terms.__slots__},
            )


def main() -> int:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--rows", default=",".join(GROUPS), help="groups of rows, and names of ours"
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the profiles")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds; no row begins later")
    parser.add_argument("--check", action="store_true", help="only print what is planned")
    asked = parser.parse_args()
    from benchmarks import tuning_ranks

    if asked.check:
        check()
        tuning_ranks.check()
        return 0
    if not torch.cuda.is_available():
        print("error: this needs a GPU", file=sys.stderr)
        return 1
    names = [name for name in asked.rows.split(",") if name]
    if names == ["ranks"]:
        return tuning_ranks.main() or 0
    only = [name for name in names if name in ROWS]
    groups = {name for name in names if name in GROUPS} | ({"ours"} if only else set())
    say(row="machine", **machine())
    rows = Rows(asked.budget)
    if groups - {"70b"}:
        eight(rows, groups, only, asked.out)
    if "70b" in groups:
        seventy(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
