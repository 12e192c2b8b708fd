"""Merging an adapter into its model, from a user's words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from oomproof.agreement import Progress, require_run_packages
from oomproof.models.resolve import resolve, with_checkpoint
from oomproof.planning.spelled import read_bytes

if TYPE_CHECKING:
    from oomproof.conversion.merge import MergeReport


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    shard: str | int = "4GiB",
    revision: str | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes a model with a LoRA adapter added to its weights, in 16 bits, shard by shard.

    Memory is bounded by a slice of one weight and the adapter. The folder appears when it is
    whole; a run that was ended goes on where it was.

    Args:
        model: The adapter's base, in 16 or 32 bits.
        adapter: A folder with adapter_config.json and adapter_model.safetensors, as peft has it.
        out: The folder to make; it must not exist, or be empty.
        dtype: "bfloat16", "float16", "float32", or "auto": the checkpoint's own.
        device: What computes: "cpu", "cuda", "cuda:1", or "auto": a GPU where there is one.
        shard: The most that a file has.
        revision: Branch, tag or commit of a hub id.
        progress: Told of bytes downloaded and merged.

    Raises:
        InputError: Any of these cannot be understood or served.
        CheckpointError: Base or adapter is damaged, or the disk is full; what is finished is kept.
    """
    require_run_packages()
    from oomproof.conversion.merge import prepare, run

    spec = with_checkpoint(resolve(str(model), revision=revision))
    job = prepare(
        spec,
        Path(adapter),
        Path(out),
        dtype=dtype,
        device=device,
        shard_bytes=read_bytes(shard, "shard") or 0,
        told=progress,
    )
    return run(job, progress)
