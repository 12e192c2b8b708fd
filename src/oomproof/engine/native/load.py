"""From a plan to a native engine that is ready for requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from oomproof.engine.native.device import NativeDevice
from oomproof.engine.native.engine import NativeEngine
from oomproof.engine.native.meter import NativeMeter
from oomproof.engine.native.stored import StoredWeights
from oomproof.engine.native.warm import start_warming
from oomproof.engine.native.workspaces import clear_workspaces
from oomproof.errors import CheckpointError, NotRunnableError
from oomproof.hardware.spec import Hardware
from oomproof.loading.pipeline import load_checkpoint, load_random
from oomproof.loading.targets import LoadProgress, LoadReport, Target, is_computed_buffer
from oomproof.models.adapter import AdapterSpec
from oomproof.models.spec import CheckpointSpec, CheckpointTensor, ModelSpec
from oomproof.planning.plan import Plan
from oomproof.units import MIB

_HEAD = "lm_head.weight"
_COMPARED_BYTES = 16 * MIB
_SCALES = {
    # Format of 4 bits → type of its stored scales.
    "nf4": torch.float32,
    "nf4-dq": torch.uint8,
    "fp4": torch.float32,
    "fp4-dq": torch.uint8,
    "int4": torch.bfloat16,
}

Fill = Callable[[Sequence[Target]], LoadReport]
"""Brings every target its tensor."""


def load_engine(
    plan: Plan,
    spec: ModelSpec,
    hardware: Hardware,
    folder: Path,
    *,
    progress: LoadProgress | None = None,
    on_reading: Callable[[], None] | None = None,
) -> NativeEngine:
    """The engine with a checkpoint's weights.

    Args:
        plan: What goes where, in which format.
        spec: The model, with the headers of its checkpoint.
        hardware: Probed before this process touched a GPU.
        folder: Where the model's files are.
        progress: Told of bytes read.
        on_reading: Called when reading begins, and this thread mostly waits.

    Raises:
        CheckpointError: A damaged file, or a value that is not finite.
        LoadError: Parameters missing, unexpected or mis-shaped.
        PlanMismatchError: The tensors take more than was planned.
        NotRunnableError: The native engine does not compute this model.
    """
    checkpoint = spec.checkpoint
    if checkpoint is None:
        raise CheckpointError(str(folder), "holds no safetensors files")
    tied_head = {_HEAD} if spec.tie_word_embeddings else set()
    if spec.tie_word_embeddings:
        refuse_another_head(folder, checkpoint)

    def fill(targets: Sequence[Target]) -> LoadReport:
        if on_reading is not None:
            on_reading()
        return load_checkpoint(
            folder,
            checkpoint,
            targets,
            progress=progress,
            ignored=lambda name: is_computed_buffer(name) or name in tied_head,
        )

    quantization = spec.checkpoint_quantization
    held = None if quantization is None else StoredWeights(folder, checkpoint, quantization)
    return _start(plan, spec, NativeMeter(hardware), fill, made_up=False, held=held)


def load_random_engine(
    plan: Plan,
    spec: ModelSpec,
    meter: NativeMeter,
    *,
    progress: LoadProgress | None = None,
    seed: int = 0,
) -> NativeEngine:
    """As `load_engine`, with random weights made on their devices.

    Args:
        plan: What goes where, in which format.
        spec: The model.
        meter: Made before this process touched a GPU.
        progress: Told of bytes made.
        seed: Makes the weights repeatable.

    Raises:
        PlanMismatchError: The tensors take more than was planned.
        NotRunnableError: The native engine does not compute this model.
    """
    return _start(
        plan,
        spec,
        meter,
        lambda targets: load_random(spec, targets, progress=progress, seed=seed),
        made_up=True,
    )


def refuse_another_head(folder: Path, checkpoint: CheckpointSpec) -> None:
    """Tied models may carry the head too, where it is the embedding once more.

    Raises:
        CheckpointError: It is another.
    """
    by_name = {tensor.name: tensor for tensor in checkpoint.tensors}
    head = by_name.get(_HEAD)
    embedding = next(
        (t for name, t in by_name.items() if name.endswith("embed_tokens.weight")), None
    )
    if head is None or embedding is None:
        return
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and all(
        left == right
        for left, right in zip(_chunks(folder, head), _chunks(folder, embedding), strict=True)
    )
    if not same:
        raise CheckpointError(
            str(folder),
            "config.json ties lm_head to the embedding, and the weights hold another lm_head",
            remedy="config and weights do not belong together; download both again",
        )


def _chunks(folder: Path, tensor: CheckpointTensor) -> Iterator[bytes]:
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.offset_bytes)
        for start in range(0, tensor.size_bytes, _COMPARED_BYTES):
            yield file.read(min(_COMPARED_BYTES, tensor.size_bytes - start))


def _start(
    plan: Plan,
    spec: ModelSpec,
    meter: NativeMeter,
    fill: Fill,
    *,
    made_up: bool,
    held: StoredWeights | None = None,
) -> NativeEngine:
    if spec.forward is None:
        raise NotRunnableError(
            f"{spec.id}: {spec.not_native}", remedy="plan with --engine transformers"
        )
    devices: list[NativeDevice] = []
    first = plan.devices_in_use[0]
    on_gpu = first.kind == "cuda"
    warming = start_warming(
        torch.device("cuda", first.index) if on_gpu else torch.device("cpu"),
        lambda: _prepare_products(plan),
    )
    with torch.inference_mode():
        meter.devices = devices
        for planned in plan.devices_in_use:
            if planned.kind == "cuda":
                meter.begin(torch.device("cuda", planned.index))
            devices.append(NativeDevice(plan, planned, spec, spec.forward))
        targets: list[Target] = []
        for device in devices:
            workspace = torch.empty(
                device.workspace_numel(), dtype=torch.float32, device=device.device
            )
            targets += device.targets(workspace, made_up=made_up, held=held)
        del workspace
        if warming is not None:
            warming.join()
        fill(targets)
        targets.clear()
        _wait(devices)
        if held is not None:
            held.check_zeros()
        if spec.adapter is not None:
            _load_adapter(spec.adapter, devices)
            _wait(devices)
        # The one that cuBLAS was given while warming up: steps run on another stream.
        clear_workspaces()
        meter.weights_loaded()
        for device in devices:
            device.allocate_pools()
        meter.pools_allocated()
    return NativeEngine(devices, plan, spec, meter)


def _load_adapter(adapter: AdapterSpec, devices: Sequence[NativeDevice]) -> None:
    """Its file's tensors into their places; it is the same where the model's weights are made up.

    Raises:
        CheckpointError: The file is damaged, or holds a value that is not finite, or not once it
            is scaled.
    """
    loras = [device.lora for device in devices if device.lora is not None]
    targets = [target for lora in loras for target in lora.targets()]
    load_checkpoint(Path(adapter.path), adapter.checkpoint, targets)
    if not all(lora.is_finite() for lora in loras):
        raise CheckpointError(
            str(Path(adapter.path) / adapter.checkpoint.files[0][0]),
            "holds values of lora_B that the compute dtype cannot hold once they are scaled",
            remedy="use bfloat16 or float32, or a smaller lora_alpha",
        )


def _wait(devices: Sequence[NativeDevice]) -> None:
    """Until all that was written is there, on whatever stream."""
    for device in devices:
        if device.device.type == "cuda":
            torch.cuda.synchronize(device.device)


def _prepare_products(plan: Plan) -> None:
    """Kernels for products of a few tokens, on every GPU: none is compiled after loading."""
    scales = {_SCALES[name] for name in plan.weight_format.members if name in _SCALES}
    if not scales:
        return
    from oomproof.quantization.dequantize_cuda import prepare_rows
    from oomproof.quantization.products_tiled import prepare

    for planned in plan.devices_in_use:
        device = torch.device("cuda", planned.index)
        dtype: torch.dtype = getattr(torch, plan.compute_dtype)
        for held in scales:
            prepare(dtype, held, device)
            prepare_rows(dtype, held, device)


def versions() -> str:
    """Of what the engine runs on."""
    found = [f"torch {torch.__version__}"]
    # A processor needs no Triton.
    with suppress(PackageNotFoundError):
        found.append(f"triton {version('triton')}")
    return ", ".join(found)
