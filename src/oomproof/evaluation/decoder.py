"""One decoder layer over one window, as the native engine computes a prompt.

It is the engine's own code over an arena for one request: the windows of a text come one after the
other, each in chunks, and take their hidden states with them.
"""

from __future__ import annotations

import torch

from oomproof.engine.native.arena import Arena
from oomproof.engine.native.kv_pool import KVPool
from oomproof.engine.native.operators import add_rms_norm
from oomproof.engine.native.rotary import fill_rotary
from oomproof.engine.native.stage import Layers
from oomproof.engine.native.weights import LayerWeights
from oomproof.formats import DType
from oomproof.memory.native import StepShape, chunk_tokens, step_layout
from oomproof.models.forward import ForwardSpec
from oomproof.models.spec import ModelSpec


class WindowDecoder:
    """The buffers of one window, and the layers of a model over them.

    Args:
        spec: The model.
        forward: Its numbers.
        context: Tokens of a window.
        compute_dtype: Of hidden states, keys and values.
        device: Where it computes.
    """

    def __init__(
        self,
        spec: ModelSpec,
        forward: ForwardSpec,
        *,
        context: int,
        compute_dtype: DType,
        device: torch.device,
    ) -> None:
        shape = StepShape(
            context=context,
            concurrency=1,
            compute_dtype=compute_dtype,
            quantized=True,
            has_head=False,
        )
        self._arena = Arena(step_layout(spec, shape), device)
        self._chunk = chunk_tokens(context)
        self._forward = forward
        fill_rotary(self._arena["rotary"], forward.rope, spec.attention[0].key_head_dim)
        self._windows = tuple(layer.sliding_window or 0 for layer in spec.attention)
        self._layers: dict[int, Layers] = {}
        """Tokens that a layer looks back at → such a layer, whichever weights it has."""
        for window in set(self._windows):
            index = self._windows.index(window)
            table = self._arena[f"pages.{window}"]
            pool = KVPool(
                spec,
                (index, index),
                context=context,
                concurrency=1,
                dtype=compute_dtype,
                device=device,
                tables={window: table},
            )
            pool.assign(0, {window: range(table.shape[1])})
            self._layers[window] = Layers(
                self._arena,
                pool,
                forward,
                (index, index),
                lambda _: self._held,
                lambda _: None,
            )
        self._weights: LayerWeights | None = None

    @property
    def _held(self) -> LayerWeights:
        assert self._weights is not None
        return self._weights

    def run(self, layer: int, weights: LayerWeights, states: torch.Tensor) -> None:
        """Takes the hidden states of a window through a layer, in place.

        Args:
            layer: Its index.
            weights: Its weights.
            states: [context, hidden], on the device.
        """
        self._weights = weights
        hidden, inputs = self._arena["hidden"], self._arena["inputs"]
        for first in range(0, len(states), self._chunk):
            part = states[first : first + self._chunk]
            rows = len(part)
            hidden[:rows].copy_(part)
            inputs[1, :rows] = torch.arange(
                first, first + rows, dtype=torch.int32, device=inputs.device
            )
            inputs[2, :rows] = 0
            self._layers[self._windows[layer]].run(rows, one_request=True)
            part.copy_(hidden[:rows])

    def normalised(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The last norm of hidden states [rows, hidden]."""
        normed = torch.empty_like(states)
        add_rms_norm(states, normed, weight, self._forward.rms_norm_eps, 1.0, False)
        return normed
