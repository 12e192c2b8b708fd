"""What a first CUDA kernel waits for, done beside everything else that loading begins with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.util import find_spec

import torch

from oomproof.errors import LoadError, MissingDependencyError, OomproofError

_MULTIPLIED: set[torch.device] = set()
"""GPUs for which cuBLAS has made a handle."""


class Warming:
    """A call in a thread of its own, whose failure is told when it is joined.

    Args:
        warm: What to do; it brings in the kernels that everything else needs.
    """

    def __init__(self, warm: Callable[[], None]) -> None:
        self._warm = warm
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="oomproof-warm", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for it.

        Raises:
            LoadError: Kernels cannot be compiled or launched here.
            OomproofError: What has words of its own: a missing package, NVRTC's refusal.
        """
        self._thread.join()
        if isinstance(self._error, (torch.OutOfMemoryError, OomproofError)):
            raise self._error
        if self._error is not None:
            lines = str(self._error).strip().splitlines() or [type(self._error).__name__]
            raise LoadError(
                f"the native engine's kernels cannot be compiled here: {lines[0][:200]}",
                remedy="Triton needs a C compiler (apt-get install gcc); or use "
                "--engine transformers",
            ) from self._error

    def _run(self) -> None:
        try:
            self._warm()
        except Exception as error:  # noqa: BLE001 - raised again by whoever joins
            self._error = error


def start_warming(device: torch.device, also: Callable[[], None] = lambda: None) -> Warming | None:
    """Begins on a GPU; join it before the first kernel is launched. None on a processor.

    A process's first Triton kernel imports the compiler and makes a digest of its files, under
    which compiled kernels are cached: together half a second.

    Args:
        device: The first GPU.
        also: What else to bring in.

    Raises:
        MissingDependencyError: Triton is not installed.
    """
    if device.type != "cuda":
        return None
    if find_spec("triton") is None:
        raise MissingDependencyError("triton", install="pip install 'oomproof[run]'")
    return Warming(lambda: _launch_first(device, also))


def _launch_first(device: torch.device, also: Callable[[], None]) -> None:
    from oomproof.engine.native import kernels_triton
    from oomproof.loading import finite_triton
    from oomproof.quantization import gate_triton, products_cuda

    # Imports are part of the wait.
    del kernels_triton, finite_triton, products_cuda
    gate = torch.zeros((1, 1), dtype=torch.bfloat16, device=device)
    with torch.cuda.device(device):
        gate_triton.silu_mul(gate, gate, gate)
        # cuBLAS makes its handle at the first product. torch takes it from this thread when that
        # ends, and gives it to the next who multiplies: a second one here would stay idle.
        if device not in _MULTIPLIED:
            torch.mm(gate, gate)
            _MULTIPLIED.add(device)
        torch.cuda.synchronize(device)
    also()
