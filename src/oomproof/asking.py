"""From what is asked for, in a user's words, to a plan: every word is read here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from oomproof.errors import InputError
from oomproof.formats import FIT
from oomproof.hardware.describe import describe
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.models.adapter import with_adapter
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec
from oomproof.planning.damage import WeightErrors
from oomproof.planning.notes import read_notes
from oomproof.planning.plan import Plan
from oomproof.planning.request import Offload, PlanRequest
from oomproof.planning.search import make_plan
from oomproof.planning.spelled import (
    read_bytes,
    read_count,
    read_limits,
    read_reserve,
    read_tokens,
)

if TYPE_CHECKING:
    from oomproof.planning.handoffs.handoff import HandOff


Progress = Callable[[str, int, int], None]
"""Called with (what is done, bytes done, bytes in all)."""


def plan(  # noqa: PLR0913 - one keyword an option of the command line
    model: str | Path,
    *,
    gpus: str | None = None,
    format: str = "auto",  # noqa: A002 - the command line's word
    kv_format: str = "auto",
    context: int | str | None = None,
    concurrency: int | str = 1,
    max_memory: Mapping[int | Literal["cpu"], int | str] | None = None,
    reserve: int | str = 0,
    cap: int | str | None = None,
    engine: str = "auto",
    compute_dtype: str = "auto",
    offload: str = "none",
    force: bool = False,
    what_would_it_take: bool = False,
    search: bool = False,
    calibration: str | Path | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Plans a model on this machine, or on a described one.

    Args:
        model: A folder, a hub id ("org/name"), a name of the catalog, or "tiny".
        gpus: A machine that is not here: "4x RTX 4090", "2x24GiB,1x12GiB".
        format: A weight format, "auto": the best quality that fits, or "fit": each projection of
            each layer in its own format, to fill the memory there is.
        kv_format: "bf16", "fp16", "fp8", or "auto".
        context: Prompt and answer in tokens (8192, "8k"), "auto" for the largest that fits, None
            for min(8192, the model's maximum).
        concurrency: Requests at once; "auto" for as many as fit.
        max_memory: Device index → most bytes the plan may use there ("20GiB"); "cpu" → host RAM.
        reserve: Free memory of each device to leave alone.
        cap: Most bytes of each device, enforced while running too.
        engine: "native", "transformers", or "auto": ours where it knows the architecture.
        compute_dtype: What quantized weights are computed in: "bfloat16", "float16", "float32", or
            "auto": what the devices are made for.
        offload: "cpu" keeps layers that fit on no device in host memory, streamed in every step.
        force: Accepts a plan that streams at less than a token a second.
        what_would_it_take: Also looks for the smallest listed hardware on which it would fit.
        search: Searches the block scales of 4-bit formats for the least error while loading.
        calibration: A file of UTF-8 text; "fit" weighs the errors of weights by what they cost on
            it. Measured once, on the processor, layer by layer, and kept.
        adapter: A folder with a LoRA adapter of peft's, used beside the weights, unmerged.
        revision: Branch, tag or commit of a hub id.
        allow_pickle: Converts a folder whose weights are pickles first, in a process of its own.
        progress: Told of "calibrate", and of bytes of the checkpoint, where that takes time.

    Raises:
        InputError: Any of these cannot be understood or served; see oomproof.errors.
    """
    spec = resolve(str(model), revision=revision, allow_pickle=allow_pickle)
    if adapter is not None:
        spec = with_adapter(spec, adapter)
    limits = read_limits(max_memory)
    request = PlanRequest(
        format=format,
        kv_format=kv_format,
        context=read_tokens(context),
        concurrency=read_count(concurrency),
        reserve_bytes=read_reserve(reserve),
        max_memory={index: size for index, size in limits.items() if index != "cpu"},
        max_host_bytes=limits.get("cpu"),
        cap_bytes=read_bytes(cap, "cap"),
        engine=engine,
        compute_dtype=compute_dtype,
        offload=cast(Offload, offload),
        force=force,
        what_would_it_take=what_would_it_take,
        search=search,
    )
    notes = read_notes() if gpus is None else None
    errors = _errors_of(spec, request, calibration, progress)
    return make_plan(spec, _hardware(gpus), request, notes, errors)


def hand_off(  # noqa: PLR0913 - one keyword an option of the command line
    model: str | Path,
    target: str,
    *,
    gpus: str | None = None,
    format: str = "auto",  # noqa: A002 - the command line's word
    kv_format: str = "auto",
    context: int | str | None = None,
    concurrency: int | str = 1,
    max_memory: Mapping[int | Literal["cpu"], int | str] | None = None,
    reserve: int | str = 0,
    cap: int | str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> HandOff:
    """Plans a model for another engine, in that engine's own format and words.

    Args:
        model: As for `plan`.
        target: "vllm", "llama.cpp" or "mlx".
        gpus: As for `plan`; for MLX also several Macs: "2x M2 Ultra 192GB".
        format: A format of the target, or "auto": the best quality that fits.
        kv_format: "fp8" for an 8-bit cache where the target has one.
        context: As for `plan`.
        concurrency: As for `plan`; "auto" is one.
        max_memory: As for `plan`.
        reserve: As for `plan`.
        cap: As for `plan`.
        revision: As for `plan`.
        allow_pickle: As for `plan`.

    Raises:
        InputError: Any of these cannot be understood or served.
        NotRunnableError: The target cannot run it: FP8 on a GPU without it, say.
    """
    from oomproof.planning.handoffs import hand_off as hand_over
    from oomproof.planning.handoffs import require_target

    require_target(target)
    spec = resolve(str(model), revision=revision, allow_pickle=allow_pickle)
    hardware = probe() if gpus is None else describe(gpus, several_machines=target == "mlx")
    limits = read_limits(max_memory)
    request = PlanRequest(
        kv_format=kv_format,
        context=read_tokens(context),
        concurrency=read_count(concurrency),
        reserve_bytes=read_reserve(reserve),
        max_memory={index: size for index, size in limits.items() if index != "cpu"},
        cap_bytes=read_bytes(cap, "cap"),
    )
    return hand_over(target, spec, hardware, request, format_name=format)


def refuse_without_fit(calibration: str | Path | None, *, has_fit: bool) -> None:
    """Refuses a text that nothing would read.

    Raises:
        InputError: There is one, and no mixture is asked for.
    """
    if calibration is not None and not has_fit:
        raise InputError(
            "calibration is what fit weighs errors by, and fit is not asked for",
            remedy="leave --calibration out, or use --format fit",
        )


def weight_errors(
    folder: Path,
    spec: ModelSpec,
    calibration: str | Path | None,
    *,
    device: DeviceSpec | None = None,
    progress: Progress | None = None,
) -> WeightErrors:
    """Measured errors of a model's weights, and what they cost on a text.

    Args:
        folder: Where its files are.
        spec: The model, with the headers of its checkpoint.
        calibration: The text; None for sensitivities that need none.
        device: Where what they cost is measured; None for the processor.
        progress: Told of "calibrate".

    Raises:
        InputError: The text cannot be read, or is too short.
        NotRunnableError: The native engine does not compute the model.
        PlanDoesNotFitError: There is too little memory to measure it.
        CheckpointError: A file is damaged.
    """
    from oomproof.loading.weight_errors import measured_errors

    errors = measured_errors(folder, spec)
    if calibration is None:
        return errors
    from oomproof.evaluation.calibrate import calibrated

    told = None if progress is None else partial(progress, "calibrate")
    return calibrated(errors, folder, spec, Path(calibration), device=device, told=told)


def _errors_of(
    spec: ModelSpec,
    request: PlanRequest,
    calibration: str | Path | None,
    progress: Progress | None,
) -> WeightErrors | None:
    """Measured errors of weights, where they matter and the weights are here; else None."""
    refuse_without_fit(calibration, has_fit=request.format == FIT)
    missing = _why_not_measured(spec)
    if request.format == FIT and missing is None:
        return weight_errors(Path(spec.source.path), spec, calibration, progress=progress)
    if calibration is not None:
        raise InputError(
            f"{spec.id} cannot be calibrated: {missing}",
            remedy="give the folder of its 16-bit checkpoint, or leave --calibration out",
        )
    return None


def _why_not_measured(spec: ModelSpec) -> str | None:
    if spec.source.kind != "folder" or spec.checkpoint is None:
        return "its weights are in no folder here"
    if spec.checkpoint_quantization is not None:
        return "its checkpoint is quantized already"
    return None if find_spec("torch") is not None else "torch is not installed"


def _hardware(gpus: str | None) -> Hardware:
    return probe() if gpus is None else describe(gpus)
