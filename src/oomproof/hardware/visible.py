"""CUDA_VISIBLE_DEVICES, read as CUDA reads it: which GPUs a process sees, and in which order.

CUDA counts GPUs in its own order: fastest first, unless CUDA_DEVICE_ORDER=PCI_BUS_ID makes it the
order of PCI addresses, which is NVML's. NVML cannot tell which GPU CUDA holds for the fastest, so
ordinals are taken as NVML's; on a machine with different GPUs they may differ from CUDA's, which
is why a plan names each GPU by UUID and loading finds it by UUID.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from oomproof.errors import HardwareError

_ORDINAL = re.compile(r"[+-]?[0-9]{1,9}")


def visible_ordinals(setting: str | None, uuids: Sequence[str]) -> tuple[int, ...]:
    """NVML indices of the GPUs that CUDA shows, in CUDA's order.

    As in CUDA, the first entry that names no GPU ends the list, and one that names a GPU twice
    hides them all.

    Args:
        setting: The value of CUDA_VISIBLE_DEVICES, None where it is not set.
        uuids: UUID of each GPU in NVML's order.

    Raises:
        HardwareError: An entry names a MIG slice.
    """
    if setting is None:
        return tuple(range(len(uuids)))
    ordinals: list[int] = []
    for entry in setting.split(","):
        ordinal = _ordinal(entry.strip(), uuids)
        if ordinal is None:
            break
        if ordinal in ordinals:
            return ()
        ordinals.append(ordinal)
    return tuple(ordinals)


def _ordinal(entry: str, uuids: Sequence[str]) -> int | None:
    if entry.startswith("MIG-"):
        raise HardwareError(
            f"CUDA_VISIBLE_DEVICES names the MIG slice {entry!r}, which cannot be probed",
            remedy='plan for its memory with --gpus "20GiB", or name a whole GPU',
        )
    if entry.startswith("GPU-"):
        named = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
        return named[0] if len(named) == 1 else None
    if _ORDINAL.fullmatch(entry) and 0 <= int(entry) < len(uuids):
        return int(entry)
    return None
