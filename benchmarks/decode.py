"""Whole models beside the usual recipe, transformers with bitsandbytes: pairs in one process.

    python -m benchmarks.decode [--rows ROW …] [--alone] > results.jsonl
    python -m benchmarks.decode --check

Each row is a process of its own: random weights at true shapes, our engine and transformers' own
`generate` (eager, its dynamic cache, greedy) in the same memory, which take turns. `oomproof bench
--against transformers` times our wrapper of transformers instead, which takes requests one by one;
here they are one batch, as people run it. Both sides are timed alike: a prompt from the call to its
first token; decoding by the time from a first few tokens to the last, all requests together. A
figure is the median of the rounds. A row is written as soon as it is there, and what it costs is in
it. `405b-four` needs four GPUs and is not among the rows that are run by themselves. `--check` only
plans the rows, for H200s that need not be here.
"""

from __future__ import annotations

import argparse
import atexit
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.rehearsals import in_a_child, machine
from oomproof.engine.messages import Request, SamplingOptions, TokenEvent
from oomproof.engine.protocol import Engine
from oomproof.errors import PlanDoesNotFitError
from oomproof.hardware.probe import probe
from oomproof.models.adapter import CONFIG_FILE, WEIGHTS_FILE, with_adapter
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.plan import Plan
from oomproof.session import plan as make_plan
from oomproof.starting import Contract, import_engine, start_timed
from oomproof.units import MIB

WARM_TOKENS = 4
"""Of each answer, that are not counted."""
_WARM_PROMPT = 16
_SEED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    model: str
    format: str = "nf4-dq"
    requests: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 48
    """Of each request; 1 where the prompt is what is timed."""
    rounds: int = 3
    cap: str | None = None
    gpus: int = 1
    has_peer: bool = True
    rank: int = 0
    """Of a LoRA adapter of all linears, made up as the weights are; 0 for none."""

    @property
    def context(self) -> int:
        """That is planned."""
        return -(-(self.prompt_tokens + self.new_tokens) // 64) * 64

    def plan(self, engine: str, gpus: str | None = None) -> Plan:
        """For one of the two sides, here or on a described machine."""
        return make_plan(
            self.model,
            gpus=gpus,
            format=self.format,
            context=self.context,
            concurrency=self.requests,
            cap=self.cap,
            engine=engine,
            adapter=None if not self.rank else made_up_adapter(self.model, self.rank),
        )


ROWS = {
    "8b-1": Row(model="llama-3.1-8b"),
    "8b-8": Row(model="llama-3.1-8b", requests=8),
    "8b-32": Row(model="llama-3.1-8b", requests=32),
    "70b-1": Row(model="llama-3.1-70b", new_tokens=32),
    "8b-32k": Row(model="llama-3.1-8b", prompt_tokens=32_768, new_tokens=32, rounds=2),
    "8b-prompt": Row(model="llama-3.1-8b", prompt_tokens=2048, new_tokens=1, rounds=7),
    "8b-prompt-bf16": Row(
        model="llama-3.1-8b", format="bf16", prompt_tokens=2048, new_tokens=1, rounds=7
    ),
    # Beside the rows without an adapter: what one costs.
    "8b-1-adapter": Row(model="llama-3.1-8b", rank=16, has_peer=False),
    "8b-8-adapter": Row(model="llama-3.1-8b", requests=8, rank=16, has_peer=False),
    "8b-32-adapter": Row(model="llama-3.1-8b", requests=32, rank=16, has_peer=False),
    # Two such GPUs hold it; under this cap it takes four. transformers needs minutes for its turn.
    "405b-four": Row(model="llama-3.1-405b", cap="64GiB", gpus=4, has_peer=False),
}
ONE_GPU = [name for name, row in ROWS.items() if row.gpus == 1]

Answer = Callable[[int, int, int], list[float]]
"""(requests, prompt tokens, new tokens) → seconds from the call until all had their next token."""


def measure(row: Row) -> dict[str, object]:
    """One row, in this process.

    Raises:
        OomproofError: It does not fit, or cannot be loaded.
    """
    from oomproof.engine.bench import Costs, Point
    from oomproof.engine.limits import measure_limits
    from oomproof.loading.devices import prepare_devices

    started = time.perf_counter()
    spec, hardware = resolve(row.model), probe()
    if row.rank:
        spec = with_adapter(spec, made_up_adapter(row.model, row.rank))
    own = row.plan("native")
    peer = row.plan("transformers") if row.has_peer else None
    for each in (own, peer):
        if each is not None and not each.fits:
            raise PlanDoesNotFitError(
                f"{row.model} in {row.format} does not fit here through {each.engine}",
                shortfall_bytes=each.shortfall_bytes,
                remedy="leave the row out with --rows",
            )
    contract = Contract(plan=own, spec=spec, hardware=hardware)
    import_engine(contract)
    prepare_devices(own, hardware)
    device = _device(own)
    limits = measure_limits(device, 8192 * MIB if device.type == "cuda" else 256 * MIB)
    began = time.perf_counter()
    engine = start_timed(contract, None, None)
    load_s = time.perf_counter() - began
    answers: dict[str, Answer] = {"ours": partial(answer_ours, engine, spec.vocab_size)}
    if peer is not None:
        answers["theirs"] = partial(answer_theirs, load_peer(peer, spec), spec.vocab_size)
    found = in_turns(answers, row)
    engine.close()
    point = Point(
        kind="prefill" if row.new_tokens == 1 else "decode",
        requests=row.requests,
        context=row.prompt_tokens,
    )
    limit = Costs.of(spec, own).limit(point, limits)
    speeds = {name: side["tokens_per_second"] for name, side in found.items()}
    return {
        **asdict(row),
        "kv_format": own.kv_format,
        "kind": point.kind,
        "layers": [device.layers for device in own.devices_in_use],
        "limits": asdict(limits),
        "limit": limit,
        "share": speeds["ours"] / limit,
        "load_s": load_s,
        **found,
        "ratio": speeds["ours"] / speeds["theirs"] if "theirs" in speeds else None,
        "measure_s": time.perf_counter() - started,
    }


def in_turns(answers: dict[str, Answer], row: Row) -> dict[str, dict[str, Any]]:
    """Each side's figures; after a short answer to warm up, they take turns."""
    prompt = min(_WARM_PROMPT, row.prompt_tokens) if row.new_tokens > 1 else row.prompt_tokens
    for answer in answers.values():
        answer(row.requests, prompt, min(row.new_tokens, WARM_TOKENS))
    moments: dict[str, list[list[float]]] = {name: [] for name in answers}
    for _ in range(row.rounds):
        for name, answer in answers.items():
            moments[name].append(answer(row.requests, row.prompt_tokens, row.new_tokens))
    return {name: figures(found, row) for name, found in moments.items()}


def figures(moments: Sequence[Sequence[float]], row: Row) -> dict[str, Any]:
    """What a side's rounds come to."""
    speeds = [speed(one, row) for one in moments]
    return {
        "tokens_per_second": median(speeds),
        "rounds_tokens_per_second": speeds,
        "first_token_s": median(one[0] for one in moments),
    }


def speed(moments: Sequence[float], row: Row) -> float:
    """Tokens a second of all requests: of the prompt where one token was drawn, else of answers."""
    if row.new_tokens == 1:
        return row.requests * row.prompt_tokens / moments[0]
    first = min(WARM_TOKENS, len(moments) - 1) - 1
    return row.requests * (len(moments) - 1 - first) / (moments[-1] - moments[first])


def answer_ours(
    engine: Engine, vocab_size: int, requests: int, prompt_tokens: int, new_tokens: int
) -> list[float]:
    """Our engine's answer; see Answer."""
    prompts = random_prompts(vocab_size, requests, prompt_tokens)
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.submit(
            Request(
                id=str(number),
                prompt_tokens=prompt,
                max_new_tokens=new_tokens,
                sampling=SamplingOptions(temperature=0),
            )
        )
    moments: list[float] = []
    drawn = 0
    while not engine.idle:
        drawn += sum(isinstance(event, TokenEvent) for event in engine.step())
        now = time.perf_counter() - started
        # All have as many tokens as there are moments.
        moments += [now] * (drawn // requests - len(moments))
    return moments


class _Clock:
    """What `generate` hands each token to, once it has left the GPU."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, _tokens: object) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


def answer_theirs(
    model: Any, vocab_size: int, requests: int, prompt_tokens: int, new_tokens: int
) -> list[float]:
    """transformers' answer, as one batch; see Answer."""
    import torch

    prompts = random_prompts(vocab_size, requests, prompt_tokens)
    tokens = torch.tensor(prompts, device=model.get_input_embeddings().weight.device)
    clock = _Clock()
    with torch.inference_mode():
        started = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
        )
    # The first thing that a streamer is handed is the prompt.
    return [moment - started for moment in clock.moments[1:]]


def random_prompts(vocab_size: int, requests: int, tokens: int) -> list[tuple[int, ...]]:
    """The same for both sides."""
    chooser = random.Random(_SEED)  # noqa: S311 - prompts, not secrets
    return [tuple(chooser.choices(range(vocab_size), k=tokens)) for _ in range(requests)]


def load_peer(plan: Plan, spec: ModelSpec) -> Any:
    """transformers' model as people load it, bitsandbytes' linears included."""
    from oomproof.compat.model import import_libraries, load_random_model

    import_libraries(plan, spec)
    return load_random_model(plan, spec)


@cache
def made_up_adapter(model: str, rank: int) -> Path:
    """A folder with a random adapter of all linears in 16 bits; it is there until the end."""
    import torch
    from safetensors.torch import save_file

    folder = Path(_FOLDERS.enter_context(TemporaryDirectory(prefix="oomproof-adapter-")))
    linears = [
        tensor
        for tensor in resolve(model).tensors
        if tensor.role is Role.LINEAR and tensor.layer is not None
    ]
    tensors = {}
    for linear in linears:
        name = f"base_model.model.{linear.name.removesuffix('.weight')}"
        rows, columns = linear.shape
        for half, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.01, 0.01)
            tensors[f"{name}.lora_{half}.weight"] = values
    save_file(tensors, folder / WEIGHTS_FILE)
    names = sorted({linear.name.removesuffix(".weight").rpartition(".")[2] for linear in linears})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": names,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


_FOLDERS = ExitStack()
atexit.register(_FOLDERS.close)


def _device(plan: Plan) -> Any:
    import torch

    used = plan.devices_in_use[0]
    return torch.device("cuda", used.index) if used.kind == "cuda" else torch.device("cpu")


def run(name: str, *, alone: bool = False) -> dict[str, object]:
    """One row, in a process of its own; `alone`: without the peer."""
    row = replace(ROWS[name], has_peer=ROWS[name].has_peer and not alone)
    if row.rank:
        # Made here, where it is removed at the end; the child just leaves.
        made_up_adapter(row.model, row.rank)
    started = time.perf_counter()
    exit_code, output = in_a_child(lambda: print(json.dumps(measure(row))))
    # Libraries may have printed something in front of it.
    found = asdict(row) if exit_code else json.loads(output.splitlines()[-1])
    return {
        "benchmark": "decode",
        "row": name,
        "exit_code": exit_code,
        "wall_s": round(time.perf_counter() - started, 1),
        **machine(),
        **found,
    }


def describe(line: dict[str, Any]) -> str:
    """A line for whoever waits."""
    if "ours" not in line:
        return f"{line['row']}: failed, exit code {line['exit_code']}"
    sides = [f"ours {line['ours']['tokens_per_second']:.1f} tokens/s ({line['share']:.0%})"]
    if "theirs" in line:
        sides.append(f"theirs {line['theirs']['tokens_per_second']:.1f}, × {line['ratio']:.2f}")
    firsts = [
        f"{line[side]['first_token_s'] * 1e3:.0f}" for side in ("ours", "theirs") if side in line
    ]
    return (
        f"{line['row']}: {', '.join(sides)}; first token {' / '.join(firsts)} ms, "
        f"load {line['load_s']:.1f} s, in all {line['wall_s']} s"
    )


def check() -> None:
    """Plans every row on H200s, and prints what fits."""
    for name, row in ROWS.items():
        for engine in ("native", "transformers") if row.has_peer else ("native",):
            made = row.plan(engine, gpus=f"{row.gpus}xH200")
            peaks = [round(device.peak_bytes / 2**30, 1) for device in made.devices_in_use]
            predicted = made.tokens_per_second
            print(f"{name:14} {engine:12} fits {made.fits} peaks {peaks} GiB, {predicted}")


def main() -> None:
    """Runs the rows that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="*", default=ONE_GPU, choices=list(ROWS))
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--check", action="store_true", help="plan the rows, run nothing")
    arguments = parser.parse_args()
    if arguments.check:
        check()
        return
    for name in arguments.rows:
        line = run(name, alone=arguments.alone)
        print(json.dumps(line), flush=True)
        print(describe(line), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
