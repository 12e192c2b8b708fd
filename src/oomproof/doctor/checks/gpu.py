"""Whether torch can use the GPUs that are there, from the bus up to the kernels."""

from __future__ import annotations

from oomproof.doctor.checks.health import lost_gpu
from oomproof.doctor.checks.packages import broken_torch
from oomproof.doctor.cuda_support import has_kernels, numbers
from oomproof.doctor.facts import Facts
from oomproof.doctor.findings import Capability, Check, Finding, Summary
from oomproof.doctor.remedies import (
    INSTALL_RUN,
    install_torch,
    nvidia_smi,
    restart,
    start_container_again,
    update_driver,
)
from oomproof.doctor.view import cuda_gpus, dotted, has_nvidia, is_jetson, visible

_NO_DRIVER = ("NVML_ERROR_DRIVER_NOT_LOADED", "NVML_ERROR_LIBRARY_NOT_FOUND")
_NOT_READY, _MISMATCH, _COMPATIBILITY, _NO_DEVICE, _BUSY, _UNKNOWN = 802, 803, 804, 100, 46, 999
"""CUDA's error numbers of cuInit."""


def _nvml(facts: Facts) -> Finding | None:
    """NVML does not answer, though something of NVIDIA is there."""
    driver, error = facts.driver, facts.driver.nvml_error
    if driver.device_nodes_denied and not facts.gpus:
        return Finding(
            status="missing",
            detail="this user may not open /dev/nvidia*",
            remedy='sudo usermod -aG video,render "$USER", then log in again',
        )
    if error is None:
        return None
    if error in _NO_DRIVER:
        return _without_driver(facts)
    detail = f"NVML does not answer: {error}"
    if error == "NVML_ERROR_LIB_RM_VERSION_MISMATCH":
        return Finding(
            status="missing",
            detail=f"{detail}: the driver's library is not of the version that is running",
            remedy=restart(facts),
        )
    if error == "NVML_ERROR_NO_PERMISSION":
        return Finding(
            status="missing",
            detail=detail,
            remedy='sudo usermod -aG video,render "$USER", then log in again',
        )
    if error == "NVML_ERROR_UNKNOWN" and facts.system.container:
        return Finding(
            status="missing",
            detail=f"{detail}: the container has lost its GPUs",
            remedy=start_container_again(),
        )
    return Finding(status="missing", detail=detail, remedy=restart(facts))


def _without_driver(facts: Facts) -> Finding | None:
    """No driver: a fault only where a GPU of NVIDIA is known to be there."""
    count = facts.driver.gpus_on_bus
    if is_jetson(facts) or not count:
        return None
    if facts.system.container:
        return Finding(
            status="missing",
            detail=f"{count} NVIDIA GPU(s) on the bus, none in this container",
            remedy=start_container_again(),
            required=False,
        )
    if facts.system.wsl:
        return Finding(
            status="missing",
            detail="Windows has an NVIDIA driver, and its library is not found here",
            remedy='export LD_LIBRARY_PATH="/usr/lib/wsl/lib:$LD_LIBRARY_PATH"',
        )
    if facts.driver.nvml_error == "NVML_ERROR_DRIVER_NOT_LOADED":
        return Finding(
            status="missing",
            detail=f"{count} NVIDIA GPU(s) on the bus; the driver is installed and not loaded",
            remedy="sudo modprobe nvidia (if it refuses: mokutil --sb-state, and reinstall it)",
        )
    return Finding(
        status="missing",
        detail=f"{count} NVIDIA GPU(s) on the bus, no NVIDIA driver",
        remedy=update_driver(facts),
    )


def _libcuda(facts: Facts) -> Finding | None:
    error = facts.driver.libcuda_error
    if error is None or not (facts.gpus and facts.gpus[0].kind == "cuda"):
        return None
    if facts.system.wsl:
        remedy = 'export LD_LIBRARY_PATH="/usr/lib/wsl/lib:$LD_LIBRARY_PATH"'
    elif facts.system.container:
        remedy = "start the container again with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    else:
        remedy = "sudo ldconfig (if it stays: reinstall the NVIDIA driver)"
    return Finding(
        status="missing",
        detail=f"NVML sees {len(facts.gpus)} GPU(s), libcuda cannot be loaded: {error}",
        remedy=remedy,
    )


def _visible_devices(facts: Facts) -> Finding | None:
    shown = visible(facts)
    if shown.setting is None:
        return None
    setting = f"CUDA_VISIBLE_DEVICES={shown.setting!r}"
    every = ",".join(str(gpu.index) for gpu in facts.gpus)
    if shown.on_purpose:
        return Finding(
            status="missing",
            detail=f"{setting} hides {len(facts.gpus)} GPU(s); models run on the CPU",
            remedy="unset CUDA_VISIBLE_DEVICES",
            required=False,
        )
    if shown.twice is not None:
        return Finding(
            status="missing",
            detail=f"{setting} names a GPU twice ({shown.twice}), for which CUDA hides them all",
            remedy=f"export CUDA_VISIBLE_DEVICES={every}",
        )
    if shown.unknown is not None:
        kept = f"{len(shown.gpus)} GPU(s)" if shown.gpus else "no GPU"
        return Finding(
            status="limited" if shown.gpus else "missing",
            detail=f"{setting}: {shown.unknown!r} names no GPU here; CUDA stops there and shows "
            f"{kept}",
            remedy=f"export CUDA_VISIBLE_DEVICES={every}",
        )
    return None


def _mig(facts: Facts) -> Finding | None:
    shown = visible(facts)
    cut = [position for position, gpu in enumerate(facts.gpus) if gpu.mig]
    if shown.names_mig:
        return Finding(
            status="missing",
            detail="CUDA_VISIBLE_DEVICES names a MIG slice, which cannot be probed",
            remedy='describe the slice: oomproof plan MODEL --gpus "20GiB"',
        )
    if not cut or not any(gpu.mig for gpu in shown.gpus):
        return None
    return Finding(
        status="missing",
        detail=f"GPU {facts.gpus[cut[0]].index} ({facts.gpus[cut[0]].name}) is cut into MIG "
        "slices, which cannot be probed",
        remedy=nvidia_smi(facts, cut[0], "-mig 0"),
    )


def _torch(facts: Facts) -> Finding | None:
    """A torch that is absent, broken or built without CUDA."""
    if not has_nvidia(facts):
        return None
    if "torch" not in facts.packages:
        return Finding(status="missing", detail=f"{_seen(facts)}; no torch", remedy=INSTALL_RUN)
    torch = facts.torch
    if torch is None:
        return broken_torch(facts)
    if torch.cuda_build is None:
        kind = f"a ROCm {torch.hip_build}" if torch.hip_build else "a CPU"
        return Finding(
            status="missing",
            detail=f"{_seen(facts)}; torch {torch.version} is {kind} build",
            remedy=install_torch(facts),
        )
    return None


def _driver_age(facts: Facts) -> Finding | None:
    """A driver older than the CUDA that torch was built for; the same major version suffices."""
    torch, newest = facts.torch, numbers(facts.driver.cuda_version)
    if torch is None or torch.sees_cuda or not newest or not cuda_gpus(facts):
        return None
    built = numbers(torch.cuda_build)
    if not built or built[0] <= newest[0]:
        return None
    return Finding(
        status="missing",
        detail=f"{_seen(facts)}; torch is built for CUDA {torch.cuda_build}, the driver supports "
        f"up to {facts.driver.cuda_version}",
        remedy=install_torch(facts),
    )


def _cuda_init(facts: Facts) -> Finding | None:
    """CUDA itself refuses to start."""
    number = facts.driver.cuda_init
    if not number or not cuda_gpus(facts):
        return None
    detail = f"{_seen(facts)}; CUDA does not start: error {number}"
    if number == _NOT_READY:
        return Finding(
            status="missing",
            detail=f"{detail}, the NVSwitch fabric is not ready",
            remedy="sudo systemctl restart nvidia-fabricmanager (of the driver's own version)",
        )
    if number == _MISMATCH:
        return Finding(
            status="missing",
            detail=f"{detail}, the driver's library is not of the version that is running",
            remedy=restart(facts),
        )
    if number == _COMPATIBILITY:
        return Finding(
            status="missing",
            detail=f"{detail}, CUDA's compatibility package is not made for this GPU",
            remedy="unset LD_LIBRARY_PATH (it leads to /usr/local/cuda/compat)",
        )
    if number == _UNKNOWN:
        return Finding(
            status="missing",
            detail=f"{detail}, unknown",
            remedy="sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm",
        )
    words = {_NO_DEVICE: ", no device", _BUSY: ", busy or unavailable"}.get(number, "")
    return Finding(status="missing", detail=detail + words, remedy=restart(facts))


def _prohibited(facts: Facts) -> Finding | None:
    for position, gpu in enumerate(facts.gpus):
        if gpu not in cuda_gpus(facts):
            continue
        taken = gpu.compute_mode == "exclusive" and bool(gpu.processes)
        if gpu.compute_mode != "prohibited" and not taken:
            continue
        why = (
            f"is in exclusive mode, and {gpu.processes[0].name} (pid {gpu.processes[0].pid}) has it"
            if taken
            else "is closed to CUDA (compute mode prohibited)"
        )
        return Finding(
            status="missing",
            detail=f"GPU {gpu.index} ({gpu.name}) {why}",
            remedy=nvidia_smi(facts, position, "-c DEFAULT"),
        )
    return None


def _kernels(facts: Facts) -> Finding | None:
    torch = facts.torch
    if torch is None or torch.cuda_build is None:
        return None
    for gpu in cuda_gpus(facts):
        how = has_kernels(torch.architectures, gpu.compute_capability)
        names = f"{gpu.name} (compute capability {dotted(gpu.compute_capability)})"
        if how is None:
            return Finding(
                status="missing",
                detail=f"torch {torch.version} has no kernels for {names}, only for "
                f"{', '.join(torch.architectures)}",
                remedy=install_torch(facts),
            )
        newest, built = numbers(facts.driver.cuda_version)[:2], numbers(torch.cuda_build)[:2]
        if how == "ptx" and newest and newest < built:
            return Finding(
                status="missing",
                detail=f"torch {torch.version} has only PTX of CUDA {torch.cuda_build} for "
                f"{names}, and the driver compiles up to {facts.driver.cuda_version}",
                remedy=update_driver(facts),
            )
    return None


def _blind_torch(facts: Facts) -> Finding | None:
    """Torch sees nothing, and none of the causes above is to be seen."""
    torch = facts.torch
    if torch is None or torch.cuda_build is None or torch.sees_cuda or not cuda_gpus(facts):
        return None
    why = f": {torch.cuda_error}" if torch.cuda_error else ""
    return Finding(
        status="missing",
        detail=f"{_seen(facts)}; torch {torch.version} sees none of them{why}",
        remedy=install_torch(facts),
    )


def _seen(facts: Facts) -> str:
    gpus = cuda_gpus(facts)
    if not gpus:
        return f"{facts.driver.gpus_on_bus or len(facts.gpus)} NVIDIA GPU(s)"
    groups = list(dict.fromkeys(gpu.name for gpu in gpus))
    counts = [sum(gpu.name == name for gpu in gpus) for name in groups]
    names = " + ".join(f"{count} × {name}" for count, name in zip(counts, groups, strict=True))
    return f"{names}, driver {facts.driver.version or 'unknown'}"


def _summary(facts: Facts) -> Summary:
    gpus = visible(facts).gpus
    if gpus and gpus[0].kind == "mps":
        return Summary(detail=f"{gpus[0].name}, through Metal")
    if not cuda_gpus(facts):
        rocm = facts.torch.hip_build if facts.torch else None
        seen = facts.torch.device_count if facts.torch else 0
        if seen and not rocm:
            return Summary(
                status="limited",
                detail=f"torch sees {seen} GPU(s), NVML none: models are planned for the CPU",
                remedy='describe the machine: oomproof plan MODEL --gpus "24GiB"',
            )
        if rocm:
            return Summary(detail=f"torch for ROCm {rocm}; AMD's GPUs are not looked at")
        return Summary(status="missing", detail="no GPU is visible; models run on the CPU")
    built = facts.torch.cuda_build if facts.torch else None
    return Summary(detail=f"{_seen(facts)}, CUDA {built or 'unknown'}")


GPU = Capability(
    name="GPU",
    required=has_nvidia,
    summary=_summary,
    checks=(
        Check(name="nvml", run=_nvml),
        Check(name="gpu-lost", run=lost_gpu),
        Check(name="libcuda", run=_libcuda),
        Check(name="visible-devices", run=_visible_devices),
        Check(name="mig", run=_mig),
        Check(name="torch-build", run=_torch),
        Check(name="driver-age", run=_driver_age),
        Check(name="cuda-init", run=_cuda_init),
        Check(name="compute-mode", run=_prohibited),
        Check(name="kernels", run=_kernels),
        Check(name="torch-sees-cuda", run=_blind_torch),
    ),
)
