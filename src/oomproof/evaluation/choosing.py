"""From names to variants: what each of them holds, on this model and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from oomproof.errors import InputError, NotRunnableError, PlanDoesNotFitError
from oomproof.evaluation.variants import (
    COMPARED,
    Asked,
    StoredFolder,
    Variant,
    plain,
    read_names,
)
from oomproof.formats import FIT, FORMATS, DType, Format, get_format
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.models.resolve import resolve, with_checkpoint
from oomproof.models.spec import ModelSpec
from oomproof.planning.damage import WeightErrors
from oomproof.planning.engines import why_not_native
from oomproof.planning.fit_bytes import fit_bytes
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a plan for "fit" would put the model: what `evaluate` may use."""

    hardware: Hardware
    device: DeviceSpec
    context: int
    compute_dtype: DType
    limits: dict[int | Literal["cpu"], int]
    reserve_bytes: int


def ask(
    formats: str | Sequence[str] | None, reference: str, spec: ModelSpec, device: DeviceSpec
) -> list[Asked]:
    """What is to be compared with the reference, without it.

    Args:
        formats: As people write them; None for every format below 16 bits that runs here.
        reference: The format of 16 bits, or of the compute dtype.
        spec: The model.
        device: Where it is computed.

    Raises:
        InputError: One is unknown, or is no format to compare.
        NotRunnableError: The model or one of them does not run here.
    """
    if spec.not_native is not None or spec.checkpoint_quantization is not None:
        why = why_not_native(spec, get_format(reference), (device,))
        why = why or "its checkpoint is quantized already"
        raise NotRunnableError(
            f"{spec.id} cannot be evaluated: {why}",
            remedy="use a 16-bit checkpoint of a family that the native engine computes",
        )
    if formats is None:
        found = read_names([name for name in COMPARED if _why_not(name, device) is None])
    else:
        found = read_names(formats)
    for one in found:
        if one.format is None or one.format in (reference, FIT):
            continue
        if one.format not in COMPARED:
            raise InputError(
                f"format {one.name!r} is not one that is compared with {reference}",
                remedy=f"use some of {', '.join(COMPARED)}, fit, or a folder",
            )
        why = _why_not(one.format, device)
        if why is not None:
            raise NotRunnableError(why, remedy="leave it out of --formats")
    found = [one for one in found if one.format != reference]
    if not found:
        raise InputError(
            f"{reference} is what formats are compared with",
            remedy=f"add some of {', '.join(COMPARED)} to --formats",
        )
    why = why_not_native(spec, get_format(reference), (device,))
    if why is not None:
        raise NotRunnableError(f"{spec.id} cannot be evaluated here: {why}")
    return found


def open_folders(asked: Sequence[Asked]) -> dict[str, StoredFolder]:
    """Name → the checkpoint of each folder among them.

    Raises:
        ModelNotFoundError, ConfigError, CheckpointError: There is none, or it is damaged.
    """
    found = {}
    for one in asked:
        if one.folder is not None:
            path = one.folder.expanduser()
            # As a path: no name of the catalog or of the hub is meant.
            spec = with_checkpoint(resolve(str(path.absolute())))
            found[one.name] = StoredFolder(spec=spec, path=path)
    return found


def variants_of(
    asked: Sequence[Asked],
    reference: str,
    spec: ModelSpec,
    folders: dict[str, StoredFolder],
    errors: WeightErrors | None,
    place: Place,
) -> tuple[Variant, ...]:
    """All of them, the reference first.

    Args:
        asked: What `ask` found.
        reference: Name of the reference's format.
        spec: The model, with the headers of its checkpoint.
        folders: What `open_folders` found.
        errors: Of the weights; None where no mixture is asked for.
        place: Where a plan would put it.

    Raises:
        InputError: A mixture has fewer bytes than the smallest format, or a folder holds another
            model.
        PlanDoesNotFitError: A mixture does not fit on the device.
    """
    from oomproof.evaluation.stored_folder import open_folder

    found = [plain(reference)]
    for one in asked:
        if one.name in folders:
            found.append(open_folder(one.name, folders[one.name], spec))
        elif one.format == FIT:
            assert errors is not None
            chosen = _fit(one, spec, errors, place)
            found.append(Variant(name=one.name, format=chosen, search=True))
        else:
            assert one.format is not None
            found.append(Variant(name=one.name, format=FORMATS[one.format], search=one.search))
    return tuple(found)


def _fit(one: Asked, spec: ModelSpec, errors: WeightErrors, place: Place) -> Format:
    # What float32 is only computed in takes 16 bits where the model runs.
    kept = DType.BFLOAT16 if place.compute_dtype is DType.FLOAT32 else place.compute_dtype
    if one.budget_bytes is not None:
        roles = QUANTIZED_ROLES["native"]
        return fit_bytes(spec, one.budget_bytes, compute_dtype=kept, roles=roles, errors=errors)
    limits = place.limits
    index = place.device.index
    plan = make_plan(
        spec,
        Hardware(devices=(place.device,), host=place.hardware.host, source=place.hardware.source),
        PlanRequest(
            format=FIT,
            engine="native",
            context=place.context,
            compute_dtype=kept.value,
            reserve_bytes=place.reserve_bytes,
            max_memory={index: limits[index]} if index in limits else {},
            max_host_bytes=limits.get("cpu"),
        ),
        errors=errors,
    )
    if not plan.fits:
        raise PlanDoesNotFitError(
            f"{spec.id} does not fit in any mixture: {format_bytes(plan.shortfall_bytes)} missing",
            shortfall_bytes=plan.shortfall_bytes,
            remedy="leave fit out of --formats, or give its bytes: fit:40MiB",
        )
    return plan.weight_format


def _why_not(name: str, device: DeviceSpec) -> str | None:
    """Why a format does not run on the device."""
    least, has = get_format(name).min_compute_capability, device.compute_capability
    if least is None or has is None or has >= least:
        return None
    needed, found = (".".join(map(str, capability)) for capability in (least, has))
    return f"{name} needs compute capability {needed}, {device.name} has {found}"
