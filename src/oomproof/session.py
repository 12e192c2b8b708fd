"""Wires probe, plan, load and engine together; every interface enters here.

plan(model, …)             → Plan
hand_off(model, target, …) → HandOff: the plan of another engine
load(plan or model, …)     → Model, which answers prompts
from_pretrained(model, …)  → an ordinary transformers model, placed by a plan
rehearse(plan or model, …) → Rehearsal: the plan at full size, with random weights
bench(plan or model, …)    → BenchReport: its speed against the machine's limits, and a peer's
tune_kernels(plan or model, …) → the fastest launches of its products here, kept
evaluate(model, text, …)   → EvalReport: what formats cost on a text, against its 16 bits
quantize(model, out, …)    → QuantizeReport: a folder with its checkpoint in 4 bits
plan_tuning(model, data, …) → TrainingPlan: what fine-tuning it on some data takes
rehearse_tuning(model, …)  → TuningRehearsal: that plan at full size, without data
tune(model, data, out, …)  → TuningReport: a LoRA adapter, trained on its quantized weights
merge(model, adapter, out, …) → MergeReport: a folder with both in 16 bits
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oomproof.adapting import plan_tuning, rehearse_tuning, tune
from oomproof.agreement import (
    RUN_PACKAGES,
    Progress,
    agree,
    agree_or_refuse,
    fetch,
    of_stage,
    require_run_packages,
)
from oomproof.asking import hand_off, plan
from oomproof.errors import InputError
from oomproof.evaluating import evaluate
from oomproof.guarding.fallback import read_fallback
from oomproof.measuring import bench, rehearse, tune_kernels
from oomproof.merging import merge
from oomproof.planning.plan import Plan
from oomproof.planning.spelled import read_bytes
from oomproof.units import format_bytes

if TYPE_CHECKING:
    from oomproof.conversion.quantize import QuantizeReport
    from oomproof.engine.model import Model
    from oomproof.guarding.engine import OnEvent

__all__ = [
    "RUN_PACKAGES",
    "Progress",
    "bench",
    "evaluate",
    "from_pretrained",
    "hand_off",
    "load",
    "merge",
    "plan",
    "plan_tuning",
    "quantize",
    "rehearse",
    "rehearse_tuning",
    "require_run_packages",
    "tune",
    "tune_kernels",
    "verify",
]


def load(
    model: Plan | str | Path,
    *,
    progress: Progress | None = None,
    fallback: str | Sequence[str] | None = None,
    on_event: OnEvent | None = None,
    trust_remote_code: bool = False,
    worker: bool = False,
    **options: Any,
) -> Model:
    """Loads a model as planned, ready to answer, and watches its memory (`oomproof top`).

    Where memory runs out, now or while it answers, what changes neither tokens nor limits is tried:
    the same plan once more, waiting for other processes, one request after the other.

    Args:
        model: A plan of this machine, or what `plan` takes.
        progress: Told of bytes downloaded and loaded.
        fallback: What else may be done then, in this order: "kv8,context,batch,format,cpu" or some
            of them, and smaller models as "org/name", which only loading turns to.
        on_event: Told of everything that is done then, and once of each leak and of each term
            above its plan, in the thread that steps; each event has a `message`.
        trust_remote_code: Lets transformers run code that the model's folder ships.
        worker: Keeps the model in a supervised process of its own, which is replaced when it fails.
        options: Those of `plan`, where `model` is not a plan.

    Raises:
        MissingDependencyError: The [run] extra is not installed.
        PlanDoesNotFitError: The plan needs more memory than there is; a LadderExhaustedError where
            something was tried.
        EngineFaultError: A device failed for good; a WorkerError where a process of its own did.
        NotRunnableError: No engine here runs it.
        LoadError: The checkpoint does not give what the plan promises.
        InputError: See `plan`, or an unknown fallback.
    """
    allowed = read_fallback(fallback)
    contract, refusal = agree_or_refuse(model, options)
    if refusal is not None and not allowed:
        raise refusal
    from oomproof.opening import open_apart, open_model

    return (open_apart if worker else open_model)(
        contract,
        partial(fetch, progress=progress, trust_remote_code=trust_remote_code),
        allowed=allowed,
        on_event=on_event,
        progress=of_stage(progress, "load"),
        trust_remote_code=trust_remote_code,
        refusal=refusal,
    )


def from_pretrained(
    model: Plan | str | Path,
    *,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """An ordinary `transformers.PreTrainedModel`, placed and quantized by a plan.

    Its KV cache is transformers' own and grows as it generates; the plan left room for it. A cap
    stays in force for as long as the process lives.

    Args:
        model: A plan of this machine, or what `plan` takes.
        progress: Told of bytes downloaded and loaded.
        trust_remote_code: Lets transformers run code that the model's folder ships.
        options: Those of `plan`, where `model` is not a plan.

    Raises:
        OomproofError: As `load` does.
    """
    if not isinstance(model, Plan):
        options.setdefault("engine", "transformers")
    contract = agree(model, options)
    _require_transformers(contract.plan)
    folder = fetch(contract.spec, progress, trust_remote_code=trust_remote_code)
    from oomproof.compat.model import load_model
    from oomproof.loading.devices import prepare_devices

    prepare_devices(contract.plan, contract.hardware)
    return load_model(
        contract.plan,
        contract.spec,
        folder,
        progress=of_stage(progress, "load"),
        trust_remote_code=trust_remote_code,
    )


def quantize(  # noqa: PLR0913 - one keyword an option of the command line
    model: str | Path,
    out: str | Path,
    *,
    format: str = "nf4-dq",  # noqa: A002 - the command line's word
    dtype: str = "auto",
    device: str = "auto",
    search: bool | None = None,
    shard: str | int = "1GiB",
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Writes a model's checkpoint in 4 bits, as a folder that transformers and `load` read.

    Memory is bounded by the largest weight's codes, whatever the model's size. A model of the hub
    is quantized while it downloads, a shard at a time. The folder appears when it is whole; a run
    that was ended goes on where it was.

    Args:
        model: As for `plan`.
        out: The folder to make; it must not exist, or be empty.
        format: "nf4", "nf4-dq", "fp4" or "fp4-dq".
        dtype: Of what is not quantized, and computed in: "bfloat16", "float16", "float32", or
            "auto": the checkpoint's own where it has 16 bits.
        device: What quantizes: "cpu", "cuda", "cuda:1", or "auto": a GPU where there is one.
        search: Whether block scales are searched for the least error; None and True are one, but
            that True is refused for a format without them. False: bitsandbytes' own, bit for bit.
        shard: The most that a file has.
        revision: Branch, tag or commit of a hub id.
        allow_pickle: Converts a folder whose weights are pickles first, in a process of its own.
        progress: Told of bytes downloaded and quantized.

    Raises:
        InputError: Any of these cannot be understood or served.
        CheckpointError: The source is damaged, or the disk is full; what is finished is kept.
    """
    require_run_packages()
    from oomproof.conversion.layout import MIN_SHARD_BYTES
    from oomproof.conversion.quantize import prepare, run
    from oomproof.models.resolve import resolve, with_checkpoint

    shard_bytes = read_bytes(shard, "shard") or 0
    if shard_bytes < MIN_SHARD_BYTES:
        raise InputError(
            f"shard {str(shard)[:40]!r} is less than {format_bytes(MIN_SHARD_BYTES)}",
            remedy="leave --shard out",
        )
    spec = with_checkpoint(resolve(str(model), revision=revision, allow_pickle=allow_pickle))
    job = prepare(
        spec,
        Path(out),
        format_name=format,
        dtype=dtype,
        device=device,
        search=search,
        shard_bytes=shard_bytes,
        told=progress,
    )
    return run(job, progress)


def verify(folder: str | Path) -> int:
    """Compares every file of a folder that `quantize` wrote with its digest.

    Returns:
        The number of files.

    Raises:
        InputError: The folder has no manifest.
        CheckpointError: A file is missing or damaged.
    """
    from oomproof.conversion.manifest import MANIFEST_FILE
    from oomproof.conversion.manifest import verify as compare

    manifest = compare(Path(folder))
    if manifest is None:
        raise InputError(
            f"{folder} has no {MANIFEST_FILE}", remedy="give a folder that `quantize` wrote"
        )
    return len(manifest.files)


def _require_transformers(agreed: Plan) -> None:
    if agreed.engine != "transformers":
        raise InputError(
            f"{agreed.model} is planned for the {agreed.engine} engine, not for transformers",
            remedy='plan it with engine="transformers"',
        )
