"""Machines in words: "4x RTX 4090", "8xA100-80GB", "2x24GiB,1x12GiB", "cpu".

A size means exactly that much free memory on a GPU of no particular make; a name means an idle
card of that name.
"""

from __future__ import annotations

import dataclasses
import re

from oomproof.errors import HardwareError, InputError
from oomproof.hardware.catalog import lookup
from oomproof.hardware.host import probe_host
from oomproof.hardware.probe import cpu_device
from oomproof.hardware.spec import DeviceSpec, Hardware, HostSpec
from oomproof.units import format_bytes, parse_bytes

MAX_COUNT = 64
"""GPUs in one group, such as the 4 of "4x RTX 4090"."""
MAX_DEVICES = 128
_MAX_TEXT = 1000
_GROUP = re.compile(r"([0-9]{1,9})\s*[x×*]\s*(.*)", re.IGNORECASE | re.DOTALL)
_SIZE = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?\s*[kmgt]i?b", re.IGNORECASE)
_BARE_NUMBER = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)\s*[gG]?")
_EXAMPLES = 'write "4x RTX 4090", "8xA100-80GB", "2x24GiB,1x12GiB" or "cpu"'


def describe(
    text: str, *, host: HostSpec | None = None, several_machines: bool = False
) -> Hardware:
    """The machine that a person means.

    Args:
        text: Groups of GPUs, with commas between; or "cpu".
        host: The machine around the GPUs. The words say nothing of its RAM and disk, so where it
            is None this machine's are taken; a GPU with unified memory brings its own RAM.
        several_machines: Whether more than one Mac may be meant, each a machine of its own.

    Raises:
        HardwareError: A part cannot be understood, or describes no machine that can exist.
    """
    if len(text) > _MAX_TEXT:
        raise HardwareError(
            f"the description of the GPUs has {len(text)} characters, at most {_MAX_TEXT} are read",
            remedy=_EXAMPLES,
        )
    if text.strip().casefold() == "cpu":
        host = host or probe_host()
        return Hardware(devices=(cpu_device(host),), host=host, source="described")
    devices: list[DeviceSpec] = []
    for part in text.split(","):
        count, device = _group(part.strip(), text)
        if len(devices) + count > MAX_DEVICES:
            raise HardwareError(
                f"{text!r} describes more than {MAX_DEVICES} GPUs", remedy="describe one machine"
            )
        devices += [
            dataclasses.replace(device, index=len(devices) + offset) for offset in range(count)
        ]
    _require_one_machine(devices, text, several_machines=several_machines)
    return Hardware(devices=tuple(devices), host=host or _host_around(devices), source="described")


def _group(part: str, text: str) -> tuple[int, DeviceSpec]:
    """A count and one device of the group."""
    match = _GROUP.fullmatch(part)
    count, what = (int(match[1]), match[2].strip()) if match else (1, part)
    if not 1 <= count <= MAX_COUNT:
        raise HardwareError(f"{part!r} asks for {count} GPUs", remedy=f"ask for 1 to {MAX_COUNT}")
    if not what:
        raise HardwareError(f"a GPU is missing in {text!r}", remedy=_EXAMPLES)
    if what.casefold() == "cpu":
        raise HardwareError(
            f"{text!r} mixes the processor with GPUs",
            remedy='write "cpu" alone, or give layers to RAM with --offload cpu',
        )
    if _SIZE.fullmatch(what):
        return count, _device_of_size(what)
    if number := _BARE_NUMBER.fullmatch(what):
        size = number[1] if float(number[1]) else 24
        raise HardwareError(
            f"{part!r} is neither a GPU nor a size", remedy=f'write "{size}GiB" for a size'
        )
    return count, lookup(what).device(0)


def _device_of_size(size: str) -> DeviceSpec:
    try:
        free_bytes = parse_bytes(size, what="GPU memory")
    except InputError as error:
        raise HardwareError(error.message, remedy='write a size such as "24GiB"') from error
    return DeviceSpec(
        index=0,
        name=f"{format_bytes(free_bytes)} GPU",
        kind="cuda",
        total_bytes=free_bytes,
        free_bytes=free_bytes,
    )


def _require_one_machine(devices: list[DeviceSpec], text: str, *, several_machines: bool) -> None:
    kinds = sorted({device.kind for device in devices})
    if len(kinds) > 1:
        raise HardwareError(
            f"{text!r} mixes GPUs of kinds {' and '.join(kinds)}, which no engine runs together",
            remedy="describe GPUs of one vendor",
        )
    if kinds == ["mps"] and len(devices) > 1 and not several_machines:
        raise HardwareError(
            f"{text!r} asks for {len(devices)} Apple GPUs, a Mac has 1",
            remedy="describe one Mac",
        )


def _host_around(devices: list[DeviceSpec]) -> HostSpec:
    host = probe_host()
    if not devices[0].unified_memory:
        return host
    return dataclasses.replace(
        host,
        total_ram_bytes=devices[0].total_bytes,
        available_ram_bytes=devices[0].free_bytes,
        cpu_name="",
        cpu_features=frozenset(),
        ram_limit_source="physical",
    )
