"""What a training plan needs before it is made. Free of torch."""

from __future__ import annotations

from oomproof.errors import HardwareError, InputError, NotRunnableError
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.memory.peft import check_targets
from oomproof.models.spec import ModelSpec
from oomproof.tuning.options import TuningSettings


def check_peft(spec: ModelSpec, settings: TuningSettings, *, on_gpu: bool) -> None:
    """Refuses what transformers and peft do not do.

    Raises:
        InputError: A target module that no layer has.
        NotRunnableError: Inputs of layers are to wait on the host of a processor.
    """
    check_targets(spec, settings.adapter.target_modules)
    if settings.checkpointing == "offload" and not on_gpu:
        raise NotRunnableError(
            "transformers keeps inputs of layers in host memory for a GPU, here is none",
            remedy="use --checkpointing layers",
        )


def check_ranks(ranks: int, settings: TuningSettings, engine: str) -> None:
    """Refuses ranks that cannot train together.

    Raises:
        NotRunnableError: The engine trains in one process only.
        InputError: A batch that they cannot share evenly, or nobody to share layers with.
    """
    if ranks == 1:
        if settings.shard == "on":
            raise InputError(
                "--shard on needs several ranks, and there is one",
                remedy="start with torchrun --nproc-per-node GPUS -m oomproof tune …",
            )
        return
    if engine != "native":
        raise NotRunnableError(
            f"{ranks} ranks train with our own engine only, this is {engine}",
            remedy="start one process, or use --engine native, which says why it cannot",
        )
    if settings.batch_size % ranks:
        below = settings.batch_size // ranks * ranks
        near = f"{below or ranks} or {below + ranks}" if below else f"{ranks}"
        raise InputError(
            f"--batch-size {settings.batch_size:,} is not shared evenly by {ranks} ranks",
            remedy=f"use --batch-size {near}",
        )


def device_of(hardware: Hardware, ranks: int) -> DeviceSpec:
    """The one that is planned for: the roomiest, or the least of as many as there are ranks.

    Raises:
        HardwareError: There are fewer.
    """
    found = sorted(hardware.devices, key=lambda one: -one.free_bytes)
    if ranks == 1 or found[0].kind == "cpu":
        return found[0]
    if len(found) < ranks:
        raise HardwareError(
            f"{ranks} ranks, and {len(found)} GPUs", remedy=f"use at most {len(found)} ranks"
        )
    return found[ranks - 1]
