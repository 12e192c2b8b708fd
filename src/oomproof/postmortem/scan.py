"""One pass over a log: its first failure with what stands around it, and how many follow.

Nothing grows with the log: one message, some lines of the traceback before it, some names.
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import TypeVar

from oomproof.faults.classify import RULES, TYPES_IN_TEXT, classify_line
from oomproof.faults.fault import Cause, Fault
from oomproof.faults.line import Line, strip_prefix, take_apart
from oomproof.postmortem.names import NAME_WORDS, NamesFound

_Kind = TypeVar("_Kind", bound=StrEnum)

_BATCH_LINES = 64
_MAX_BODY_LINES = 12
_MAX_FRAMES = 160
_MAX_SHOWN = 200
_JSON_KEYS = ('"error"', '"exception"', '"exc_info"', '"traceback"', '"stacktrace"', '"stack"')
_ENDS_A_MESSAGE = (
    "Traceback (most recent call last)",
    "During handling of the above exception",
    "The above exception was the direct cause",
)


class Stage(StrEnum):
    """What the program was doing, by the functions of the traceback."""

    LOADING = "loading"
    GENERATING = "generating"
    TRAINING = "training"
    UNKNOWN = "unknown"


class Spot(StrEnum):
    """What a tensor was for that did not fit, by the lines of the traceback."""

    KV_CACHE = "kv-cache"
    ATTENTION = "attention"
    LOGITS = "logits"
    UNKNOWN = "unknown"


# The innermost word that is known decides nothing: `forward` is in all three. The order does.
_STAGES = (
    (
        Stage.TRAINING,
        re.compile(
            r"\b(?:run_backward|training_step|inner_training_loop|optimizer\.step|loss\.backward"
            r"|Trainer\.train|trainer\.train)\b"
        ),
    ),
    (
        Stage.GENERATING,
        re.compile(
            r"\bin (?:generate|_sample|_prefill|prefill|greedy_search|beam_search|execute_model"
            r"|profile_run|_dummy_run|determine_\w{1,40}|decode_\w{1,40})\b"
            r"|\.generate\(|\bpipe(?:line)?\("
        ),
    ),
    (
        Stage.LOADING,
        re.compile(
            r"\bin (?:from_pretrained|load_model|load_weights|load_state_dict|dispatch_model"
            r"|_load_\w{1,60}|set_module_tensor_to_device|create_quantized_param|load_checkpoint"
            r"|initialize_model|_materialize_copy)\b|\.from_pretrained\(|\bmodel\.(?:to|cuda|half)\("
            r"|llama_model_load|load_tensors:"
        ),
    ),
)
_SPOTS = (
    (Spot.KV_CACHE, re.compile(r"cache_utils|key_cache|value_cache|kv_cache|past_key_values\.upd")),
    (Spot.LOGITS, re.compile(r"lm_head|logits\s*=|logits\.float|cross_entropy|LogitsProcessor")),
    (
        Spot.ATTENTION,
        re.compile(r"attn_weights|attention_scores|scaled_dot_product|eager_attention|baddbmm"),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a log says."""

    lines: int
    first: Fault | None
    """The first failure: what follows is mostly its consequence."""
    stage: Stage = Stage.UNKNOWN
    spot: Spot = Spot.UNKNOWN
    more: Mapping[Cause, int] = field(default_factory=dict)
    """Failures after the first, by cause, the most frequent first."""
    models: tuple[str, ...] = ()
    """Names of models, in the order of their first mention."""
    accelerators: tuple[str, ...] = ()
    """What may be names of GPUs, likewise."""
    num_gpus: int = 1
    """The least number of GPUs that the log speaks of."""
    hip: bool = False
    """Whether it is AMD's stack."""
    last_error: str | None = None
    """The last exception that no rule knows."""


def scan(lines: Iterable[str]) -> Reading:
    """Reads a log once.

    Args:
        lines: Without their ends, each of a bounded length (`read_lines`).
    """
    scanner = _Scanner()
    waiting = iter(lines)
    while batch := list(islice(waiting, _BATCH_LINES)):
        scanner.feed_batch(batch)
    return scanner.reading()


class _Scanner:
    def __init__(self) -> None:
        self._lines = 0
        self._frames: deque[str] = deque(maxlen=_MAX_FRAMES)
        self._names = NamesFound()
        self._first: tuple[Line, list[str]] | None = None
        self._first_fault: Fault | None = None
        self._first_frames = ""
        self._body_left = 0
        self._more: Counter[Cause] = Counter()
        self._last_error: str | None = None

    def feed_batch(self, lines: list[str]) -> None:
        """Takes the next lines; most of a long log are dropped together."""
        text = "\n".join(lines)
        if not self._body_left and not any(word in text for word in _WORDS):
            self._lines += len(lines)
            return
        for line in lines:
            self.feed(line)

    def feed(self, line: str) -> None:
        """Takes the next line, of text or of a log whose lines are JSON."""
        self._lines += 1
        if line.startswith("{") and (inner := _inside_json(line)):
            for one in inner:
                self._take(one)
            self._body_left = 0
        else:
            self._take(line)

    def _take(self, line: str) -> None:
        self._names.feed(line)
        if "Traceback (most recent" in line:
            self._frames.clear()
        fault, taken = self._fault_of(line)
        if self._body_left:
            if taken is None or (fault is not None and taken.type is None) or _of_nccl(taken):
                self._continue(line)
                return
            self._body_left = 0
        if fault is None or taken is None:
            if taken is not None and taken.type is not None:
                self._last_error = f"{taken.type}: {taken.message}"[:_MAX_SHOWN].strip()
            self._frames.append(line[:_MAX_SHOWN])
            return
        if self._first is None:
            self._first, self._first_fault = (taken, [line]), fault
            self._first_frames = "\n".join(self._frames)
        else:
            self._more[fault.cause] += 1
        self._body_left = _MAX_BODY_LINES

    def _fault_of(self, line: str) -> tuple[Fault | None, Line | None]:
        """The failure that a line begins; the line taken apart, where it may begin one at all."""
        if not any(needle in line for needle in _NEEDLES):
            return None, None
        taken = take_apart(line)
        fault = classify_line(taken, taken.message)
        if fault is None and taken.type is None:
            return None, None
        return fault, taken

    def _continue(self, line: str) -> None:
        """A line behind a failure: part of its message, until a blank one."""
        ended = not strip_prefix(line).strip() or any(end in line for end in _ENDS_A_MESSAGE)
        self._body_left = 0 if ended else self._body_left - 1
        if not ended and self._first is not None and not self._more:
            self._first[1].append(line)
        self._frames.append(line[:_MAX_SHOWN])

    def reading(self) -> Reading:
        """All that was found."""
        stage, spot = Stage.UNKNOWN, Spot.UNKNOWN
        fault = self._first_fault
        if self._first is not None:
            taken, body = self._first
            whole = "\n".join([taken.message, *(strip_prefix(line) for line in body[1:])])
            fault = classify_line(taken, whole) or fault
            stage = _found(_STAGES, self._first_frames, Stage.UNKNOWN)
            spot = _found(_SPOTS, self._first_frames, Spot.UNKNOWN)
        device = -1 if fault is None or fault.device is None else fault.device
        return Reading(
            lines=self._lines,
            first=fault,
            stage=stage,
            spot=spot,
            more=dict(self._more.most_common()),
            models=self._names.models,
            accelerators=self._names.accelerators,
            num_gpus=max(1, device + 1, self._names.num_gpus),
            hip=fault is not None and fault.evidence.text.startswith("HIP "),
            last_error=self._last_error,
        )


def _inside_json(line: str) -> list[str]:
    """The lines of the error that a line of JSON carries; what users said has other names in it."""
    if not any(key in line for key in _JSON_KEYS):
        return []
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # cut, or nested without end
        return []
    values = (record.get(key.strip('"')) for key in _JSON_KEYS) if isinstance(record, dict) else ()
    return [one for value in values if isinstance(value, str) for one in value.splitlines()]


def _found(table: tuple[tuple[_Kind, re.Pattern[str]], ...], text: str, default: _Kind) -> _Kind:
    return next((kind for kind, pattern in table if pattern.search(text)), default)


def _of_nccl(taken: Line) -> bool:
    """NCCL's own error stands in the lines behind torch's, and what CUDA said behind that."""
    return taken.short_type.startswith("nccl")


_NEEDLES = tuple(
    sorted({rule.needle for rule in RULES} | set(TYPES_IN_TEXT) | {"Error", "Exception"})
)
"""One of them is in every line that begins a failure."""
_WORDS = (*_NEEDLES, *NAME_WORDS, "Traceback (most", 'File "', "│", "load_tensors:")
"""One of them is in every line that tells anything."""
