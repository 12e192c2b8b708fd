"""The lines that mend: each one command, or one thing to do, made from the facts."""

from __future__ import annotations

import shlex

from oomproof.doctor.cuda_support import MIN_DRIVERS, best_wheels, numbers
from oomproof.doctor.facts import Facts
from oomproof.doctor.view import capabilities, cuda_gpus, has_nvidia, is_jetson

INSTALL_RUN = "pip install 'oomproof[run]'"
TORCH = "'torch>=2.10'"
BITSANDBYTES = "'bitsandbytes>=0.50,<1'"
"""The first that takes the nearest library of the same CUDA major version: bitsandbytes#1980."""
_INDEX = "https://download.pytorch.org/whl"
_JETSON_INDEXES = {12: "https://pypi.jetson-ai-lab.io/jp6/cu126"}
_NEW_JETSON_INDEX = "https://pypi.jetson-ai-lab.io/sbsa/cu130"
_BUILT_FOR_TORCH = ("torchvision", "torchaudio")
_LAST_DRIVERS = (((3, 5), 470), ((7, 2), 580))
"""Up to this compute capability, the last driver branch there is."""


def install_torch(facts: Facts) -> str:
    """Brings the build of torch that the driver and every visible GPU run."""
    packages = " ".join((TORCH, *(name for name in _BUILT_FOR_TORCH if name in facts.packages)))
    start = f"pip install --force-reinstall {packages}"
    if facts.system.name == "Darwin":
        return start
    driver = numbers(facts.driver.cuda_version)
    if is_jetson(facts):
        index = _JETSON_INDEXES.get(driver[0] if driver else 13, _NEW_JETSON_INDEX)
        return f"{start} --index-url {index}"
    if not has_nvidia(facts):
        return f"{start} --index-url {_INDEX}/cpu"
    wheels = best_wheels(
        facts.driver.cuda_version, capabilities(facts), machine=facts.system.machine
    )
    if wheels is None:
        return update_driver(facts)
    return f"{start} --index-url {_INDEX}/{wheels.tag}"


def update_driver(facts: Facts) -> str:
    """Brings the driver that the builds of torch need which have kernels for the GPUs."""
    wheels = best_wheels(None, capabilities(facts), machine=facts.system.machine)
    last = _last_driver(facts)
    if wheels is None or (last is not None and last < MIN_DRIVERS[12]):
        return "use the CPU (export CUDA_VISIBLE_DEVICES=-1): no torch runs on this GPU any more"
    branch = MIN_DRIVERS[wheels.cuda[0]]
    if facts.system.wsl:
        return f"install NVIDIA driver {branch} or newer in Windows, then run: wsl --shutdown"
    if facts.system.container:
        return f"install NVIDIA driver {branch} or newer on the host of this container"
    return f"install NVIDIA driver {branch} or newer (https://www.nvidia.com/drivers), then reboot"


def upgrade(package: str, specifier: str) -> str:
    """Installs a package in the versions that another one asks for."""
    return f"pip install {shlex.quote(f'{package}{specifier}')}"


def restart(facts: Facts) -> str:
    """Makes driver and library meet again after an update."""
    if facts.system.wsl:
        return "in Windows, run: wsl --shutdown"
    if facts.system.container:
        return "reboot the host of this container: its driver was updated while it was running"
    return "sudo reboot"


def start_container_again() -> str:
    """Gives a container its GPUs back."""
    return "start the container again with its GPUs: docker run --gpus all …"


def nvidia_smi(facts: Facts, position: int, options: str) -> str:
    """A setting of one GPU.

    Args:
        facts: Of the machine.
        position: In `Facts.gpus`.
        options: What nvidia-smi is asked to do.
    """
    where = " (on the host of this container)" if facts.system.container else ""
    return f"sudo nvidia-smi -i {facts.gpus[position].index} {options}{where}"


def _last_driver(facts: Facts) -> int | None:
    weakest = min(
        (gpu.compute_capability for gpu in cuda_gpus(facts) if gpu.compute_capability), default=None
    )
    if weakest is None:
        return None
    return next((branch for newest, branch in _LAST_DRIVERS if weakest <= newest), None)
