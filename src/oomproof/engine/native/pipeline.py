"""A step of the whole model over its devices: eager for prompts, CUDA graphs for decoding.

It turns rows of (token, position, slot) into drawn tokens, and knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from oomproof.engine.native.device import NativeDevice
from oomproof.engine.native.ends import Head
from oomproof.engine.native.operators import next_inputs
from oomproof.engine.native.sampler import Sampler
from oomproof.memory.native import graph_sizes, next_piece, prompt_sizes
from oomproof.memory.sampler import MAX_ALTERNATIVES

PADDING_SLOT = -1
_PROMPTS_TURN = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What a step drew, row by row."""

    tokens: list[int]
    logprobs: list[float]
    top_tokens: list[list[int]]
    top_logprobs: list[list[float]]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a step on one device, which a graph can hold."""

    device: NativeDevice
    run: Callable[[], None]
    after: Callable[[], None]
    """Hands the result to the next piece's device; outside any graph."""


class Pipeline:
    """The devices of a plan as one model.

    Args:
        devices: In order along the model, weights and pools in place.
        max_rows: The most tokens of one call.
        requests: Requests at once.
    """

    def __init__(self, devices: Sequence[NativeDevice], max_rows: int, requests: int) -> None:
        self.devices = devices
        self._requests = requests
        self._followers = [*devices[1:], None]
        self._last = next(device for device in devices if device.final_norm is not None)
        self._head_device = next(device for device in devices if device.head is not None)
        assert self._head_device.head is not None
        assert self._head_device.sampler is not None
        self._head: Head = self._head_device.head
        self.sampler: Sampler = self._head_device.sampler
        on_gpu = self._head_device.device.type == "cuda"
        self._drawn = self._head_device.arena["drawn"]
        self._host_inputs = torch.zeros((3, max_rows), dtype=torch.int32, pin_memory=on_gpu)
        self._inputs_sent = [torch.cuda.Event() for device in devices if device.stream]
        # What a step draws is read while the next one is computed, and brings its own; a prompt's
        # token comes between.
        self._host_drawn = torch.zeros((3, requests), dtype=torch.int64, pin_memory=on_gpu)
        self._brought = [torch.cuda.Event() for _ in range(3)] if on_gpu else []
        self._turn = 0
        self._holds_rows = False
        """Whether the devices have the rows of a decode step still, and what it drew."""
        self._host_logprobs = torch.zeros(requests, pin_memory=on_gpu)
        self._host_top_tokens = torch.zeros(
            (requests, MAX_ALTERNATIVES), dtype=torch.int32, pin_memory=on_gpu
        )
        self._host_top_logprobs = torch.zeros((requests, MAX_ALTERNATIVES), pin_memory=on_gpu)
        self._host_rows = self._host_inputs.numpy()
        self._sizes: list[int] = []
        self._steps: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        """(rows, greedy) → a whole step, from rows on the device to drawn tokens; on one device."""
        self._prompts: dict[int, list[torch.cuda.CUDAGraph]] = {}
        """Tokens of a piece of a prompt → its layers, device after device."""
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}
        self._draw_graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    @contextmanager
    def streams(self) -> Iterator[None]:
        """Everything inside runs on the devices' own streams, without gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            for device in reversed(self.devices):
                if device.stream is not None:
                    stack.enter_context(torch.cuda.stream(device.stream))
            yield

    def prefill(
        self,
        tokens: Sequence[int],
        position: int,
        slot: int,
        *,
        draws: bool,
        greedy: bool,
        most_layers: int | None = None,
    ) -> int | None:
        """A chunk of one request's prompt, and the token after it where `draws`.

        Returns:
            What `read` finds the token by, or None.
        """
        rows = len(tokens)
        size = rows
        self._holds_rows = False
        if most_layers is None:
            size = next((size for size in self._prompts if size >= rows), rows)
        graphs = self._prompts.get(size)
        self._write(tokens, range(position, position + rows), [slot] * rows, size)
        self._send()
        for number, device in enumerate(self.devices):
            if number:
                self._hand_over(self.devices[number - 1], device, size)
            if graphs is None:
                self._run_prompt(device, size, most_layers=most_layers)
            else:
                graphs[number].replay()
        if draws:
            assert self._last.final_norm is not None
            self._head.receive(self._last.final_norm.run(rows - 1, 1))
            self._draw(1, greedy=greedy)
            return self._bring(_PROMPTS_TURN)
        return None

    def logits(self, first: int, end: int) -> Iterator[torch.Tensor]:
        """Those of rows first … end - 1 of the last `prefill`, some at a time, on the host.

        As many as there are requests at once: the buffers are theirs.
        """
        assert self._last.final_norm is not None
        for begin in range(first, end, self._requests):
            rows = min(self._requests, end - begin)
            self._head.receive(self._last.final_norm.run(begin, rows))
            # Always as many: no other product than those of decode steps is looked for.
            yield self._head.run(self._requests)[:rows].cpu()

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        *,
        greedy: bool,
    ) -> int:
        """One token of each of several requests.

        Returns:
            What `read` finds the tokens by.
        """
        rows = len(tokens)
        size = next((size for size in self._sizes if size >= rows), rows)
        self._write(tokens, positions, slots, size)
        self._send()
        self._step(size, greedy=greedy)
        self._holds_rows = True
        return self._bring_in_turn()

    def decode_on(self, rows: int, *, greedy: bool) -> int:
        """One more token of each request of the last call, which was `decode` or this.

        It is launched while that is computed: what it draws need not come to the host first.

        Args:
            rows: Of the last call.
            greedy: As in `decode`.

        Returns:
            What `read` finds the tokens by.
        """
        size = next((size for size in self._sizes if size >= rows), rows)
        next_inputs(self._head_device.arena["inputs"][:, :size], self._drawn[:size])
        self._step(size, greedy=greedy)
        return self._bring_in_turn()

    def _step(self, size: int, *, greedy: bool) -> None:
        """A decode step of the rows that every device has."""
        step = self._steps.get((size, greedy))
        if step is not None:
            step.replay()
            return
        graphs = self._graphs.get(size)
        for number, piece in enumerate(self._pieces(size)):
            if graphs is None:
                piece.run()
            else:
                graphs[number].replay()
            piece.after()
        drawing = self._draw_graphs.get((size, greedy))
        if drawing is None:
            self._draw(size, greedy=greedy)
        else:
            drawing.replay()

    def _bring_in_turn(self) -> int:
        self._turn = 1 - self._turn
        return self._bring(self._turn)

    def _bring(self, turn: int) -> int:
        """Sends what was drawn to the host."""
        self._host_drawn[turn].copy_(self._drawn, non_blocking=True)
        if self._head_device.stream is not None:
            self._brought[turn].record(self._head_device.stream)
        return turn

    def read(self, turn: int, rows: int, *, logprobs: bool) -> Drawn:
        """What a call drew; waits for it.

        Args:
            turn: What the call returned. Of decode steps at most one was launched after it, of
                prompts none.
            rows: Of the call.
            logprobs: Whether those of the last call are read, too: it was this one.
        """
        if logprobs:
            self._host_logprobs.copy_(self.sampler.logprobs, non_blocking=True)
            self._host_top_tokens.copy_(self.sampler.top_tokens, non_blocking=True)
            self._host_top_logprobs.copy_(self.sampler.top_logprobs, non_blocking=True)
            self.wait()
        elif self._brought:
            self._brought[turn].synchronize()
        return Drawn(
            tokens=self._host_drawn[turn, :rows].tolist(),
            logprobs=self._host_logprobs[:rows].tolist() if logprobs else [],
            top_tokens=self._host_top_tokens[:rows].tolist() if logprobs else [],
            top_logprobs=self._host_top_logprobs[:rows].tolist() if logprobs else [],
        )

    @property
    def is_recorded(self) -> bool:
        """Whether decode steps are launched as graphs, and computed while the caller goes on."""
        return bool(self._sizes)

    @property
    def is_one_graph(self) -> bool:
        """Whether a decode step is all on one device."""
        return bool(self._steps)

    @property
    def goes_on(self) -> bool:
        """Whether `decode_on` computes the step after the last one launched."""
        return self._holds_rows and self.is_one_graph

    def piece_of(self, tokens: int) -> int:
        """How many of a prompt's next tokens are best processed at once."""
        sizes = list(self._prompts)
        return next_piece(tokens, sizes) if sizes else tokens

    @property
    def graph_sizes(self) -> list[int]:
        """Rows of a decode step for which there are graphs, ascending."""
        return list(self._sizes)

    def capture(self, chunk_tokens: int) -> None:
        """Runs every kind of step once, then records them as CUDA graphs.

        Decode steps of powers of two up to the requests at once, and that number itself; pieces of
        prompts of prompt_sizes. Rows of padding write nothing. Where layers are streamed, steps
        stay eager: their copies have a schedule.

        Args:
            chunk_tokens: Tokens of a prompt that are processed at once.
        """
        on_gpu = self._head_device.stream is not None
        if not on_gpu:
            return
        streamed = any(device.layer_stream is not None for device in self.devices)
        # All layers have the same kernels, unless some are adapted; streamed ones come in turn and
        # are not left out.
        adapted = any(device.lora is not None for device in self.devices)
        most_layers = None if streamed or adapted else 1
        with self.streams():
            # Products have kernels of their own for up to 16, 32 and 64 tokens, and for more.
            sizes = prompt_sizes(chunk_tokens)
            for rows in sorted({min(rows, chunk_tokens) for rows in (1, 17, 33, 65, *sizes)}):
                self.prefill([0] * rows, 0, 0, draws=True, greedy=rows > 1, most_layers=most_layers)
            self.wait()
            for rows in () if streamed else sizes:
                self._prompts[rows] = [
                    _recorded(device, partial(self._run_prompt, device, rows))
                    for device in self.devices
                ]
            for rows in graph_sizes(self._requests):
                self._write([], [], [], rows)
                self._send()
                for number, device in enumerate(self.devices):
                    self._run_device(device, rows, most_layers=most_layers)
                    self._hand_over(device, self._followers[number], rows)
                for greedy in (True, False):
                    self._draw(rows, greedy=greedy)
                    next_inputs(self._head_device.arena["inputs"][:, :rows], self._drawn[:rows])
                self.wait()
                if streamed:
                    continue
                self._sizes.append(rows)
                if len(self.devices) == 1:
                    for greedy in (True, False):
                        self._steps[rows, greedy] = _recorded(
                            self._head_device, partial(self._whole_step, rows, greedy=greedy)
                        )
                    continue
                pieces = self._pieces(rows)
                graphs = [_recorded(piece.device, piece.run) for piece in pieces]
                for greedy in (True, False):
                    self._draw_graphs[rows, greedy] = _recorded(
                        self._head_device, partial(self._draw, rows, greedy=greedy)
                    )
                self._graphs[rows] = graphs
            self.wait()

    def _pieces(self, rows: int) -> list[_Piece]:
        """A decode step of so many rows, up to the normalised hidden states at the head."""
        return [
            _Piece(
                device,
                partial(self._run_device, device, rows),
                partial(self._hand_over, device, following, rows),
            )
            for device, following in zip(self.devices, self._followers, strict=True)
        ]

    def _run_device(
        self, device: NativeDevice, rows: int, *, most_layers: int | None = None
    ) -> None:
        if device.embedding is not None:
            device.embedding.run(rows)
        if device.layers is not None:
            device.layers.run(rows, one_request=False, most_layers=most_layers)
        if device.final_norm is not None:
            device.final_norm.run(0, rows)

    def _run_prompt(
        self, device: NativeDevice, rows: int, *, most_layers: int | None = None
    ) -> None:
        if device.embedding is not None:
            device.embedding.run(rows)
        if device.layers is not None:
            device.layers.run(rows, one_request=True, most_layers=most_layers)

    def _hand_over(self, device: NativeDevice, following: NativeDevice | None, rows: int) -> None:
        if following is not None:
            following.arena["hidden"][:rows].copy_(device.arena["hidden"][:rows], non_blocking=True)
        else:
            self._head.receive(device.arena["normed"][:rows])

    def _draw(self, rows: int, *, greedy: bool) -> None:
        logits = self._head.run(rows)
        slots = self._head_device.arena["inputs"][2, :rows]
        draw = self.sampler.sample_greedy if greedy else self.sampler.sample
        draw(logits, slots, self._drawn[:rows])

    def _whole_step(self, rows: int, *, greedy: bool) -> None:
        """A decode step on one device."""
        device = self._head_device
        self._run_device(device, rows)
        self._hand_over(device, None, rows)
        self._draw(rows, greedy=greedy)

    def _write(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], rows: int
    ) -> None:
        """Puts a call's rows where they are sent from; beyond those given is padding."""
        # The last copy must have left the host before its source is written again.
        for event in self._inputs_sent:
            event.synchronize()
        given = len(tokens)
        for row, values in zip(self._host_rows, (tokens, positions, slots), strict=True):
            row[:given] = values
        self._host_rows[:2, given:rows] = 0
        self._host_rows[2, given:rows] = PADDING_SLOT

    def _send(self) -> None:
        for number, device in enumerate(self.devices):
            device.arena["inputs"].copy_(self._host_inputs, non_blocking=True)
            if device.stream is not None:
                self._inputs_sent[number].record(device.stream)

    def wait(self) -> None:
        """Until everything is computed."""
        for device in self.devices:
            if device.stream is not None:
                device.stream.synchronize()


def _recorded(device: NativeDevice, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """What a call enqueues on a device, to be replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(device.stream):
        graph.capture_begin()
        try:
            run()
        finally:
            graph.capture_end()
    return graph
