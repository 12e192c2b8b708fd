"""What is asked in a process of its own, since it may crash or hang: NVML, CUDA, torch, packages.

`python -P -m oomproof.doctor.probes.child STAGE…` prints a line of JSON as each stage begins, and
one as it ends; whoever reads them knows from the last one where the process died.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TextIO

MAX_ERROR = 300
"""Characters of an error that are kept."""
_FEATURES = 64


def main(names: Sequence[str]) -> None:
    """Runs some of STAGES, one after the other."""
    # Libraries talk on stdout as they are imported; the answers have a way of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name in names:
        _say(answers, stage=name)
        try:
            _say(answers, stage=name, answer=STAGES[name]())
        except BaseException as error:  # noqa: BLE001 - SystemExit, too, is an answer
            _say(answers, stage=name, error=first_line(error))


def first_line(error: BaseException) -> str:
    """An error's own first line, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:MAX_ERROR]


def _say(answers: TextIO, **values: Any) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def _nvml() -> dict[str, Any]:
    import psutil
    import pynvml

    from oomproof.doctor.probes.nvml import read_driver_and_gpus

    family = psutil.Process(os.getppid())
    own_pids = {family.pid, *(child.pid for child in family.children())}
    return read_driver_and_gpus(pynvml, own_pids=frozenset(own_pids))


def _cuda() -> dict[str, Any]:
    """What the driver's own library says when it is started."""
    import ctypes

    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
        return {"cuda_init": int(library.cuInit(0))}
    except (OSError, AttributeError) as error:
        return {"libcuda_error": first_line(error)}


def _nvrtc() -> dict[str, Any]:
    from oomproof.kernels.compiler import nvrtc_architectures, nvrtc_version

    return {"version": nvrtc_version(), "architectures": list(nvrtc_architectures())}


def _torch() -> dict[str, Any]:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sees_cuda = bool(torch.cuda.is_available())
    spoken = [str(warning.message) for warning in said if "CUDA" in str(warning.message)]
    architectures: list[str] = []
    if torch.version.cuda is not None:
        # torch.cuda.get_arch_list() is empty wherever no GPU can be used.
        flags = torch._C._cuda_getArchFlags()  # noqa: SLF001
        architectures = (flags or "").split()
    return {
        "version": str(torch.__version__),
        "cuda_build": torch.version.cuda,
        "hip_build": torch.version.hip,
        "sees_cuda": sees_cuda,
        "device_count": int(torch.cuda.device_count()) if sees_cuda else 0,
        "architectures": architectures,
        "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
        "cuda_error": spoken[0].split("(Triggered")[0].strip()[:MAX_ERROR] if spoken else None,
    }


def _four_bit() -> dict[str, Any]:
    """Multiplies by a small NF4 weight, on the GPU where there is one."""
    import bitsandbytes
    import torch

    layer = bitsandbytes.nn.Linear4bit(
        _FEATURES, _FEATURES, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    return _product(layer, dtype="bfloat16")


def _eight_bit() -> dict[str, Any]:
    """Multiplies by a small weight of LLM.int8()."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(_FEATURES, _FEATURES, bias=False, has_fp16_weights=False)
    return _product(layer, dtype="float16")


def _product(layer: Any, *, dtype: str) -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vector = torch.ones(1, _FEATURES, dtype=getattr(torch, dtype), device=device)
    with torch.inference_mode():
        product = layer.to(device)(vector)
    return {"works": bool(torch.isfinite(product).all())}


def _imports(name: str) -> Callable[[], dict[str, Any]]:
    def stage() -> dict[str, Any]:
        __import__(name)
        return {"works": True}

    return stage


STAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "nvml": _nvml,
    "cuda": _cuda,
    "nvrtc": _nvrtc,
    "triton": _imports("triton"),
    "torch": _torch,
    "four_bit": _four_bit,
    "eight_bit": _eight_bit,
    "flash_attention": _imports("flash_attn"),
}


if __name__ == "__main__":
    main(sys.argv[1:])
