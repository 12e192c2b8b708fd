"""What formats cost on a model and a text: from a user's words to a report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from oomproof.agreement import Progress, fetch, of_stage, require_run_packages
from oomproof.errors import InputError, NotRunnableError
from oomproof.formats import FORMATS, DType, get_format
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.profiles import NATIVE_FORMATS, engine_profile
from oomproof.models.resolve import resolve, with_checkpoint
from oomproof.models.spec import ModelSpec
from oomproof.planning.engines import why_not_native
from oomproof.planning.request import COMPUTE_DTYPES
from oomproof.planning.spelled import read_bytes, read_limits, read_tokens

if TYPE_CHECKING:
    import torch

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
        tokens: The most tokens to predict (32768, "32k"); None for 32k.
        context: Tokens of a window; None for min(2048, the model's maximum).
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
        PlanDoesNotFitError: There is not enough memory; it says for how many tokens there is.
        MissingDependencyError, LoadError: As `load` does.
    """
    require_run_packages()
    begin_s = time.perf_counter()
    from oomproof.evaluation.windows import DEFAULT_TOKENS, cut_windows, read_text

    wanted = _count(tokens, DEFAULT_TOKENS, "tokens", 1, MAX_TOKENS)
    limits = read_limits(max_memory)
    reserved = read_bytes(reserve, "reserve") or 0
    spec = resolve(str(model), revision=revision, allow_pickle=allow_pickle)
    hardware = probe()
    device = max(hardware.devices, key=lambda one: one.free_bytes)
    dtype = _compute_dtype(compute_dtype)
    names = _read_formats(formats, _REFERENCES[dtype], spec, device)
    length = _context(context, spec)
    path = Path(text)
    words = read_text(path, wanted)

    spec = with_checkpoint(spec)
    folder = fetch(spec, progress, trust_remote_code=False)
    from oomproof.compat.tokenizer import TransformersTokenizer, read_generation_defaults

    tokenizer = TransformersTokenizer(folder, defaults=read_generation_defaults(folder))
    windows = cut_windows(
        words, tokenizer, tokens=wanted, context=length, name=f"text {str(path)!r}"
    )

    from oomproof.evaluation.needs import find_room, needs_of

    host_bytes = min(hardware.host.available_ram_bytes, limits.get("cpu", 1 << 60))
    usable = min(device.free_bytes - reserved, limits.get(device.index, 1 << 60))
    room = find_room(
        needs_of(
            spec,
            names,
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
    from oomproof.evaluation.conclude import conclude
    from oomproof.evaluation.run import Job, Walk

    assert spec.forward is not None
    job = Job(
        spec=spec,
        forward=spec.forward,
        folder=folder,
        windows=windows,
        formats=names,
        compute_dtype=dtype,
        device=_torch_device(device),
        profile=engine_profile("native", device, hardware.host),
        states_on_device=room.states_on_device,
    )
    try:
        found = Walk(job, of_stage(progress, "load")).run()
    finally:
        if job.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
    return conclude(
        job,
        found,
        text=path.name,
        device=device.name,
        peak_bytes=room.peak_bytes,
        seed=seed,
        seconds=time.perf_counter() - begin_s,
    )


def _torch_device(device: DeviceSpec) -> torch.device:
    """Where torch computes.

    Raises:
        HardwareError: torch cannot use the GPU.
    """
    import torch

    if device.kind != "cuda":
        return torch.device("cpu")
    from oomproof.loading.devices import check_cuda, set_up_cuda

    set_up_cuda()
    check_cuda(device.index, device.uuid)
    found = torch.device("cuda", device.index)
    torch.cuda.set_device(found)
    return found


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


def _read_formats(
    formats: str | Sequence[str] | None, reference: str, spec: ModelSpec, device: DeviceSpec
) -> tuple[str, ...]:
    """The formats to evaluate, the reference first.

    Raises:
        InputError: One is unknown, or is no format to compare.
        NotRunnableError: The model or one of them does not run here.
    """
    if spec.not_native is not None or spec.checkpoint_quantization is not None:
        why = why_not_native(spec, get_format(reference), (device,))
        raise NotRunnableError(
            f"{spec.id} cannot be evaluated: {why}",
            remedy="use a 16-bit checkpoint of a family that the native engine computes",
        )
    known = [n for n, f in FORMATS.items() if f.is_quantized and n in NATIVE_FORMATS]
    if formats is None:
        names = [name for name in known if _why_not(name, device) is None]
    else:
        listed = formats.split(",") if isinstance(formats, str) else list(formats)
        names = [name.strip() for name in listed if name.strip()]
        if not names:
            raise InputError("formats lists none", remedy=f'write "{",".join(known)}"')
    found = [reference]
    for name in names:
        if name not in known and name != reference:
            get_format(name[:40])
            raise InputError(
                f"format {name!r} is not one that is compared with {reference}",
                remedy=f"use some of {', '.join(known)}",
            )
        why = _why_not(name, device)
        if why is not None:
            raise NotRunnableError(why, remedy="leave it out of --formats")
        if name not in found:
            found.append(name)
    if len(found) == 1:
        raise InputError(
            f"{reference} is what formats are compared with",
            remedy=f"add some of {', '.join(known)} to --formats",
        )
    why = why_not_native(spec, get_format(reference), (device,))
    if why is not None:
        raise NotRunnableError(f"{spec.id} cannot be evaluated here: {why}")
    return tuple(found)


def _why_not(name: str, device: DeviceSpec) -> str | None:
    """Why a format does not run on the device."""
    least, has = get_format(name).min_compute_capability, device.compute_capability
    if least is None or has is None or has >= least:
        return None
    needed, found = (".".join(map(str, capability)) for capability in (least, has))
    return f"{name} needs compute capability {needed}, {device.name} has {found}"
