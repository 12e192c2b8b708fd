"""A checkpoint in 4 bits, one unit at a time: its codes as they are, never quantized again."""

from __future__ import annotations

import torch

from oomproof.engine.native.layout import Block, lay_out_block
from oomproof.engine.native.load import refuse_another_head
from oomproof.engine.native.stored import StoredWeights
from oomproof.engine.native.weights import LayerWeights, Parameter
from oomproof.errors import InputError
from oomproof.evaluation.needs import stored_bytes, unit_tensors
from oomproof.evaluation.variants import StoredFolder, Variant
from oomproof.formats import FORMATS, DType
from oomproof.loading.pipeline import load_checkpoint
from oomproof.loading.targets import is_computed_buffer
from oomproof.memory.profiles import EngineProfile
from oomproof.memory.weights import stored
from oomproof.models.spec import ModelSpec, Role


class StreamedFolder:
    """One unit of it, in memory that is allocated once.

    Args:
        variant: Which checkpoint.
        compute_dtype: Of what it does not hold in 4 bits.
        device: Where everything is.
        profile: Of the native engine there.
    """

    def __init__(
        self, variant: Variant, compute_dtype: DType, device: torch.device, profile: EngineProfile
    ) -> None:
        assert variant.stored is not None
        spec, folder = variant.stored.spec, variant.stored.path
        quantization = spec.checkpoint_quantization
        assert spec.checkpoint is not None
        assert quantization is not None
        self._folder, self._checkpoint = folder, spec.checkpoint
        self._held = StoredWeights(folder, spec.checkpoint, quantization)
        self._blocks = [
            lay_out_block(
                [
                    (t, stored(t, variant.format, compute_dtype, profile.quantized_roles))
                    for t in unit
                ],
                variant.format.name,
            )
            for unit in unit_tensors(spec)
        ]
        assert quantization.parts is not None
        placed = [one for block in self._blocks for one in block.placed]
        self._known = {one.spec.name for one in placed} | {
            part.name
            for one in placed
            if one.held.quantized
            for part in quantization.parts(one.spec.name, one.spec.shape)
        }
        if spec.tie_word_embeddings:
            refuse_another_head(folder, spec.checkpoint)
            self._known.add("lm_head.weight")
        size = stored_bytes(spec, variant, compute_dtype, profile)
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._device = device
        self._block = self._blocks[0]

    def read(self, unit: int) -> Block:
        """Brings a unit, in place of the last one.

        Raises:
            CheckpointError, LoadError: As load_checkpoint, or codes that are not of the format.
        """
        # What is computed still may read what the loader's own streams will write, and after it.
        self._wait()
        self._block = self._blocks[unit]
        workspace = torch.empty(0, device=self._device)
        targets = []
        for placed in self._block.placed:
            parameter = Parameter(placed, self.memory)
            if placed.held.quantized:
                targets += self._held.targets(parameter)
            else:
                targets.append(parameter.target(workspace))
        load_checkpoint(
            self._folder,
            self._checkpoint,
            targets,
            ignored=lambda name: name in self._known or is_computed_buffer(name),
        )
        self._wait()
        return self._block

    def layer(self) -> LayerWeights:
        """The layer that was read."""
        return LayerWeights(self._block, self.memory)

    def plain(self, role: Role) -> torch.Tensor:
        """A tensor of the unit that was read, in the compute dtype."""
        placed = next(one for one in self._block.placed if one.spec.role is role)
        return Parameter(placed, self.memory).tensor

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def open_folder(name: str, stored_folder: StoredFolder, spec: ModelSpec) -> Variant:
    """A checkpoint in 4 bits as a variant of a model.

    Args:
        name: That it is shown by.
        stored_folder: The checkpoint.
        spec: The model in 16 bits.

    Raises:
        InputError: It is not quantized to 4 bits as the native engine reads them, or it is one of
            another model.
    """
    own, path = stored_folder.spec, stored_folder.path
    quantization = own.checkpoint_quantization
    if quantization is None:
        raise InputError(
            f"{path} is not quantized: there are no codes to compare",
            remedy="name formats, or a folder that `oomproof quantize` wrote",
        )
    held_as = FORMATS.get(quantization.held_as or "")
    if held_as is None or held_as.quant_type is None:
        raise InputError(
            f"{path} is quantized by {quantization.method}, not by bitsandbytes in 4 bits",
            remedy="use a folder that `oomproof quantize` wrote",
        )
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
    differs = [t.name for t in own.tensors if shapes.get(t.name) != t.shape]
    if differs or len(shapes) != len(own.tensors) or own.forward != spec.forward:
        what = f"parameter {differs[0]!r}" if differs else "the numbers of its config.json"
        raise InputError(
            f"{path} is no checkpoint of {spec.id}: {what} differ",
            remedy="compare it with the 16-bit model that it was made from",
        )
    return Variant(name=name, format=held_as, stored=stored_folder)
