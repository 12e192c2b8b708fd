"""What formats cost on a model and a text: from a user's words to a report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from oomproof.agreement import Progress, fetch, of_stage, require_run_packages
from oomproof.asking import refuse_without_fit, weight_errors
from oomproof.errors import InputError
from oomproof.evaluation.choosing import Place, ask, open_folders, variants_of
from oomproof.formats import FIT, DType
from oomproof.hardware.probe import probe
from oomproof.memory.profiles import engine_profile
from oomproof.models.resolve import resolve, with_checkpoint
from oomproof.models.spec import ModelSpec
from oomproof.planning.request import COMPUTE_DTYPES
from oomproof.planning.spelled import read_limits, read_reserve, read_tokens

if TYPE_CHECKING:
    from oomproof.evaluation.report import EvalReport

MAX_TOKENS = 1 << 24
_REFERENCES = {DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16", DType.FLOAT32: "fp32"}


def evaluate(  # noqa: PLR0913 - one keyword an option of the command line
    model: str | Path,
    text: str | Path,
    *,
    formats: str | Sequence[str] | None = None,
    tokens: int | str | None = None,
    context: int | str | None = None,
    calibration: str | Path | None = None,
    compute_dtype: str = "auto",
    max_memory: Mapping[int | Literal["cpu"], int | str] | None = None,
    reserve: int | str = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> EvalReport:
    """Compares formats of a model with its 16 bits on a text, layer by layer, on one device.

    Args:
        model: A folder, a hub id, a name of the catalog, or "tiny".
        text: A file of UTF-8 text.
        formats: "nf4,int4" or a list; None for every format below 16 bits that runs here.
            "nf4+search" has searched scales, "fit" is a plan's mixture, "fit:40MiB" one of at most
            so many bytes, and "./folder" what `quantize` wrote.
        tokens: The most tokens to predict (32768, "32k"); None for 32k.
        context: Tokens of a window; None for min(2048, the model's maximum).
        calibration: A file of UTF-8 text that "fit" weighs errors by; see `plan`.
        compute_dtype: "bfloat16", "float16", "float32", or "auto": bfloat16.
        max_memory: Device index → most bytes to use there ("20GiB"); "cpu" → host RAM.
        reserve: Free memory of the device to leave alone.
        revision: Branch, tag or commit of a hub id.
        allow_pickle: Converts a folder whose weights are pickles first, in a process of its own.
        seed: Of the draws that confidence intervals come from.
        progress: Told of bytes downloaded, and of the bytes of layers that are done with ("load").

    Raises:
        InputError: Any of these cannot be understood or served.
        NotRunnableError: The native engine does not compute this model, or a format here.
        ModelNotFoundError, CheckpointError: A folder is not there, or damaged.
        PlanDoesNotFitError: There is not enough memory; it says for how many tokens there is.
        MissingDependencyError, LoadError: As `load` does.
    """
    require_run_packages()
    begin_s = time.perf_counter()
    from oomproof.evaluation.windows import (
        DEFAULT_TOKENS,
        cut_windows,
        read_text,
        refuse_unknown_tokens,
    )

    wanted = _count(tokens, DEFAULT_TOKENS, "tokens", 1, MAX_TOKENS)
    limits = read_limits(max_memory)
    reserved = read_reserve(reserve)
    spec = resolve(str(model), revision=revision, allow_pickle=allow_pickle)
    hardware = probe()
    device = max(hardware.devices, key=lambda one: one.free_bytes)
    dtype = _compute_dtype(compute_dtype)
    asked = ask(formats, _REFERENCES[dtype], spec, device)
    has_fit = any(one.format == FIT for one in asked)
    refuse_without_fit(calibration, has_fit=has_fit)
    folders = open_folders(asked)
    length = _context(context, spec)
    path = Path(text)
    words = read_text(path, wanted)

    spec = with_checkpoint(spec)
    folder = fetch(spec, progress, trust_remote_code=False)
    from oomproof.compat.tokenizer import TransformersTokenizer, read_generation_defaults

    tokenizer = TransformersTokenizer(folder, defaults=read_generation_defaults(folder))
    name = f"text {str(path)!r}"
    windows = cut_windows(words, tokenizer, tokens=wanted, context=length, name=name)
    refuse_unknown_tokens((*windows.inputs, *windows.targets), spec.vocab_size, name=name)
    place = Place(
        hardware=hardware,
        device=device,
        context=length,
        compute_dtype=dtype,
        limits=limits,
        reserve_bytes=reserved,
    )
    errors = None
    if has_fit:
        errors = weight_errors(folder, spec, calibration, device=device, progress=progress)
    variants = variants_of(asked, _REFERENCES[dtype], spec, folders, errors, place)

    from oomproof.evaluation.needs import find_room, needs_of

    host_bytes = min(hardware.host.available_ram_bytes, limits.get("cpu", 1 << 60))
    usable = min(device.free_bytes - reserved, limits.get(device.index, 1 << 60))
    room = find_room(
        needs_of(
            spec,
            variants,
            context=length,
            compute_dtype=dtype,
            device=device,
            hardware=hardware,
        ),
        hardware,
        device,
        usable_bytes=max(0, usable),
        host_bytes=host_bytes,
        windows=len(windows.inputs),
        context=length,
        scored=windows.scored,
    )
    from oomproof.evaluation.conclude import conclude, refuse_overflow
    from oomproof.evaluation.devices import torch_device
    from oomproof.evaluation.run import Job, Walk

    assert spec.forward is not None
    job = Job(
        spec=spec,
        forward=spec.forward,
        folder=folder,
        windows=windows,
        variants=variants,
        compute_dtype=dtype,
        device=torch_device(device),
        profile=engine_profile("native", device, hardware.host),
        states_on_device=room.states_on_device,
    )
    try:
        found = Walk(job, of_stage(progress, "load")).run()
    finally:
        if job.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
    refuse_overflow(job, found.figures)
    return conclude(
        job,
        found,
        text=path.name,
        device=device.name,
        peak_bytes=room.peak_bytes,
        seed=seed,
        seconds=time.perf_counter() - begin_s,
    )


def _count(value: int | str | None, default: int, what: str, least: int, most: int) -> int:
    from oomproof.units import parse_tokens

    if value is None:
        return default
    count = parse_tokens(value, what=what) if isinstance(value, str) else value
    if not least <= count <= most:
        raise InputError(f"{what} {count:,} must be from {least:,} to {most:,}")
    return count


def _context(value: int | str | None, spec: ModelSpec) -> int:
    from oomproof.evaluation.windows import DEFAULT_CONTEXT, LEAST_CONTEXT

    limit = spec.max_position_embeddings
    if read_tokens(value) == "auto":
        return limit
    count = _count(value, min(DEFAULT_CONTEXT, limit), "context", LEAST_CONTEXT, 1 << 30)
    if count > limit:
        raise InputError(
            f"context {count:,} is beyond what {spec.id} was made for",
            remedy=f"ask for at most {limit:,} tokens",
        )
    return count


def _compute_dtype(asked: str) -> DType:
    if asked not in COMPUTE_DTYPES:
        raise InputError(
            f"unknown compute dtype {asked[:40]!r}",
            remedy=f"use one of {', '.join(COMPUTE_DTYPES)}",
        )
    return DType.BFLOAT16 if asked == "auto" else DType(asked)
