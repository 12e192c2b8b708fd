"""Tunes the products of a plan's decode steps on its GPUs, and keeps what was found.

Shapes are the model's, weights are made up: no file is read, and of a model there is one product at
a time. How a launch is chosen and timed is quantization/tune_products.py; where it is kept and from
then on looked up, quantization/tuned.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from oomproof.engine.native.step_products import StepProduct, products_of, random_set
from oomproof.errors import InputError, NotRunnableError, PlanDoesNotFitError
from oomproof.formats import FORMATS, DType
from oomproof.kernels.compiler import installed_nvrtc
from oomproof.memory.native import StepShape, graph_sizes, scratch_bytes
from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import DevicePlan, Plan
from oomproof.quantization.gpus import gpu_of, limits_of
from oomproof.quantization.product_4bit import INPUTS, warps_choices
from oomproof.quantization.products_tiled import MOST_NORMED, prepare
from oomproof.quantization.products_wide import is_wide, used_template
from oomproof.quantization.tiled_launch import TEMPLATES
from oomproof.quantization.tune_products import (
    LaunchTimer,
    ProductTiming,
    Shape,
    candidates,
    find_best,
    wide_candidates,
)
from oomproof.quantization.tuned import Gpu, ProductKey, claim_file, write_launches
from oomproof.units import MIB, format_bytes

COPIES_BYTES = 400 * MIB
"""Of a product's weights in turn: several times the second cache of any GPU today."""
_MAX_COPIES = 64
_INPUT_BYTES = 32 * MIB
"""More than inputs and results of a few tokens, and the graphs, take."""

Told = Callable[[str, ProductTiming], None]
"""Called with the device's name and what was measured."""
Time = Callable[[Shape], float]
"""Microseconds of a launch."""


class ProductBench(Protocol):
    """A GPU on which launches are timed."""

    @property
    def gpu(self) -> Gpu:
        """Which kind it is."""

    @property
    def limits(self) -> tuple[int, int]:
        """(Multiprocessors, bytes of shared memory that a block may have)."""

    def timing(
        self, product: StepProduct, tokens: int, *, normed: bool
    ) -> AbstractContextManager[Time]:
        """Times launches of a product, with memory of its own while the context lasts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTuning:
    """What was found on one kind of GPU."""

    device: str
    file: str
    """Where it is kept."""
    timings: tuple[ProductTiming, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningReport:
    """Everything that a tuning found."""

    model: str
    format: str
    devices: tuple[DeviceTuning, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `bench --tune --json`."""
        return {
            "model": self.model,
            "format": self.format,
            "devices": [
                {
                    "device": one.device,
                    "file": one.file,
                    "timings": [timing.as_dict() for timing in one.timings],
                }
                for one in self.devices
            ],
        }


def check_tunable(plan: Plan) -> None:
    """Refuses a plan whose products have no launches to choose from.

    Raises:
        InputError: Its format is not of 4 bits, or it computes in float32.
        NotRunnableError: It uses no GPU, or another engine.
    """
    if any(planned.kind != "cuda" for planned in plan.devices_in_use):
        raise NotRunnableError(
            f"tuning times kernels of NVIDIA GPUs, and {plan.model} is planned for a processor",
            remedy="run it where such a GPU is (see `oomproof doctor`)",
        )
    if plan.engine != "native":
        raise NotRunnableError(
            f"tuning times kernels of the native engine, and {plan.model} in {plan.format} is "
            f"planned for {plan.engine}",
            remedy="use --engine native --format nf4-dq",
        )
    if plan.weight_format.weight_dtype is not DType.UINT8:
        of_4_bits = [name for name, one in FORMATS.items() if one.weight_dtype is DType.UINT8]
        raise InputError(
            f"{plan.format} has no launches to choose from, formats of 4 bits have",
            remedy=f"use --format {' or '.join(of_4_bits)}",
        )
    if getattr(torch, plan.compute_dtype) not in INPUTS:
        raise InputError(
            f"products in {plan.compute_dtype} have no launches to choose from",
            remedy="compute in bfloat16",
        )


def tune_plan(plan: Plan, spec: ModelSpec, told: Told | None = None) -> TuningReport:
    """Tunes every kind of GPU that has layers, and keeps what was found.

    Args:
        plan: Its format, and its requests: steps of so many rows are decoded.
        spec: Its model.
        told: Told of each product.

    Raises:
        InputError: As `check_tunable`; or what is found cannot be kept.
        NotRunnableError: As `check_tunable`; or the model's shapes do not suit the kernel.
        PlanDoesNotFitError: A device has less free memory now than one product takes.
    """
    check_tunable(plan)
    products = products_of(plan, spec)
    benches: dict[tuple[Gpu, int], GpuBench] = {}
    for planned in plan.devices_in_use:
        if planned.layers is not None:
            bench = GpuBench(plan, planned, spec)
            benches.setdefault((bench.gpu, bench.limits[0]), bench)
    for gpu, _ in benches:
        claim_file(gpu)
    devices = [tune_on(bench, plan, spec, products, told) for bench in benches.values()]
    torch.cuda.empty_cache()
    return TuningReport(model=plan.model, format=plan.format, devices=tuple(devices))


def tune_on(
    bench: ProductBench,
    plan: Plan,
    spec: ModelSpec,
    products: Sequence[StepProduct],
    told: Told | None = None,
) -> DeviceTuning:
    """Tunes one GPU, and keeps what was found.

    Raises:
        InputError: It cannot be kept.
    """
    timings = []
    for product in products:
        for tokens in graph_sizes(plan.concurrency):
            if tokens > TEMPLATES[-1] and not is_wide(tokens, bench.gpu):
                continue
            timing = _tune(bench, plan, scratch_of(plan, spec), product, tokens)
            if timing is None:
                continue
            timings.append(timing)
            if told is not None:
                told(bench.gpu.name, timing)
    path = write_launches(
        bench.gpu,
        {timing.key for timing in timings},
        [timing.tuned for timing in timings if timing.tuned is not None],
        _versions(),
    )
    return DeviceTuning(device=bench.gpu.name, file=str(path), timings=tuple(timings))


def _versions() -> str:
    """Of what compiled the kernels and launched them."""
    return f"torch {torch.__version__}, {installed_nvrtc()}"


def _tune(
    bench: ProductBench, plan: Plan, scratch: int, product: StepProduct, tokens: int
) -> ProductTiming | None:
    """What was measured of a product; None where the step multiplies it in pieces."""
    key, shapes = _choices(bench, plan, scratch, product, tokens, normed=False)
    if not shapes:
        return None
    normed = product.has_norm and tokens <= MOST_NORMED and shapes[0].splits == 1
    if normed:
        key, shapes = _choices(bench, plan, scratch, product, tokens, normed=True)
    with bench.timing(product, tokens, normed=normed) as time:
        default, best = find_best(shapes, time)
    return ProductTiming(
        name=product.name,
        tokens=tokens,
        key=key,
        default=default,
        best=best,
        candidates=len(shapes),
    )


def _choices(
    bench: ProductBench,
    plan: Plan,
    scratch: int,
    product: StepProduct,
    tokens: int,
    *,
    normed: bool,
) -> tuple[ProductKey, Sequence[Shape]]:
    """(A product's name, the launches that it can have), of the kernel that multiplies it."""
    processors, shared_limit = bench.limits
    template = used_template(tokens, bench.gpu)
    key = product.key(template, processors, normed=normed)
    if is_wide(tokens, bench.gpu):
        return key, wide_candidates(key, tokens, shared_limit, scratch)
    dtype, scales = getattr(torch, plan.compute_dtype), getattr(torch, product.scales)
    choices = warps_choices(template, dtype, scales)
    return key, candidates(key, tokens, choices, shared_limit, scratch)


def scratch_of(plan: Plan, spec: ModelSpec) -> int:
    """Bytes of scratch that the engine's products will have."""
    shape = StepShape(
        context=plan.context,
        concurrency=plan.concurrency,
        compute_dtype=DType(plan.compute_dtype),
        quantized=True,
        has_head=False,
    )
    return scratch_bytes(spec, shape)


def copies_of(size_bytes: int, room_bytes: int) -> int:
    """Copies of a product's weights that are timed in turn, 0 where there is no room for one."""
    return min(_MAX_COPIES, max(1, COPIES_BYTES // size_bytes), room_bytes // size_bytes)


class GpuBench:
    """The device itself; see ProductBench.

    Args:
        plan: Its memory is the bound.
        planned: The device.
        spec: The model.

    Raises:
        CudaError, KernelCompileError, MissingDependencyError: As products_tiled.prepare.
    """

    def __init__(self, plan: Plan, planned: DevicePlan, spec: ModelSpec) -> None:
        self._planned = planned
        self._device = torch.device("cuda", planned.index)
        self._dtype: torch.dtype = getattr(torch, plan.compute_dtype)
        self._scratch_bytes = scratch_of(plan, spec)
        self._prepared: set[torch.dtype] = set()
        self.gpu = gpu_of(self._device)
        self.limits = limits_of(self._device)

    @contextmanager
    def timing(self, product: StepProduct, tokens: int, *, normed: bool) -> Iterator[Time]:
        """See ProductBench.

        Raises:
            PlanDoesNotFitError: There is no room for the product.
        """
        scales: torch.dtype = getattr(torch, product.scales)
        if scales not in self._prepared:
            prepare(self._dtype, scales, self._device, every=True)
            self._prepared.add(scales)
        # What the last product had.
        torch.cuda.empty_cache()
        with torch.inference_mode():
            count = self._copies(product)
            scratch = torch.empty(self._scratch_bytes, dtype=torch.uint8, device=self._device)
            copies = [random_set(product.block, self._device) for _ in range(count)]
            yield LaunchTimer(
                copies,
                tokens,
                self._dtype,
                scratch,
                normed=normed,
                gated=product.is_gated,
            )

    def _copies(self, product: StepProduct) -> int:
        terms, size = self._planned.terms, product.block.size_bytes
        # Nothing of ours is allocated by now: what is free is without our own context.
        free, _ = torch.cuda.mem_get_info(self._device)
        room = min(free, self._planned.usable_bytes - terms.cuda_context) - terms.margin
        room -= self._scratch_bytes + _INPUT_BYTES
        count = copies_of(size, room)
        if count < 1:
            raise PlanDoesNotFitError(
                f"timing {product.name} takes {format_bytes(size)} on GPU {self._planned.index}, "
                f"which has {format_bytes(max(0, room))} to spare",
                shortfall_bytes=size - room,
                remedy="free memory there, or raise --cap",
            )
        return count
