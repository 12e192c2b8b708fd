"""Options that several commands share, spelled once."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from oomproof.engine.messages import SamplingOptions, check_max_new_tokens
from oomproof.engine.text import read_stops
from oomproof.errors import InputError
from oomproof.models.resolve import BUNDLED

if TYPE_CHECKING:
    from oomproof.planning.plan import Plan

Model = Annotated[
    str,
    typer.Argument(
        help="A folder, a hub id (org/name), a well-known name (llama-3.1-8b), or `tiny`.",
        show_default=False,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="Weight format; auto: the best that fits; fit: a mixture that fills the memory.",
    ),
]
KVFormat = Annotated[str, typer.Option("--kv-format", help="KV cache: auto, bf16, fp16, fp8.")]
Context = Annotated[
    str | None,
    typer.Option(
        "--context",
        "--max-model-len",
        help="Prompt and answer in tokens: 8192, 32k, auto for the largest that fits. "
        "[default: 8k, or the model's maximum]",
        show_default=False,
    ),
]
Concurrency = Annotated[
    str, typer.Option("--concurrency", help="Requests at once: 4, or auto for as many as fit.")
]
Offload = Annotated[
    str,
    typer.Option(
        "--offload", help="none, or cpu: stream layers that fit on no GPU from host memory."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Accept a plan that streams at under a token a second.")
]
Search = Annotated[
    bool,
    typer.Option(
        "--search", help="Search the block scales of 4-bit weights for the least error at load."
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="A file of UTF-8 text that fit weighs the errors of weights by; measured once.",
        metavar="FILE",
        show_default=False,
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        help="A folder with a LoRA adapter (peft's), used beside the weights, unmerged.",
        show_default=False,
    ),
]
Fallback = Annotated[
    str | None,
    typer.Option(
        "--fallback",
        help="What may be done where memory runs out, in this order: kv8, context, batch, format, "
        "ORG/NAME, cpu.",
        metavar="RUNG,…",
        show_default=False,
    ),
]
MaxMemory = Annotated[
    list[str] | None,
    typer.Option(
        "--max-memory",
        help="Most memory of a device: 0=20GiB, or of the host: cpu=64GiB. Repeat for more.",
        metavar="I=SIZE",
    ),
]
Reserve = Annotated[
    str | None, typer.Option("--reserve", help="Free memory of each device to leave alone: 2GiB.")
]
Cap = Annotated[
    str | None,
    typer.Option("--cap", help="Most memory of each device, enforced while running: 24GiB."),
]
Engine = Annotated[str, typer.Option("--engine", help="auto, native or transformers.")]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read pytorch_model*.bin of a folder, in a process of its own that makes tensors and "
        "nothing else.",
    ),
]
Note = Annotated[
    bool,
    typer.Option("--note/--no-note", help="Keep what was measured for the next plan here."),
]
Worker = Annotated[
    bool | None,
    typer.Option(
        "--worker/--no-worker",
        help="Keep the model in a process of its own, replaced when it fails. [default: on GPUs]",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        help="Bound of an answer. [default: 512, or what the context has room for]",
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        help="0 takes the most likely token each time. [default: the model's own, or 1]",
        show_default=False,
    ),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Draw from the K most likely; 0 for all.")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Draw from the most likely that hold this probability."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help="Drop tokens less likely than this share of the most likely one."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        help="Above 1 makes tokens of prompt and answer less likely. [default: the model's own, "
        "or 1]",
        show_default=False,
    ),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option("--presence-penalty", help="Above 0 makes tokens of the answer less likely."),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty", help="Above 0 makes them the less likely the more often they came."
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes the answer repeatable.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the answer before this text. Repeat for more."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let transformers run code the model ships."),
]


MAX_DEVICE_INDEX_DIGITS = 6
MAX_REQUESTS = 4096
"""As planning.request.MAX_CONCURRENCY."""


def check_sampling(
    *, max_new_tokens: int | None, stop: list[str] | None, **sampling: float | None
) -> dict[str, Any]:
    """Refuses options of an answer that are out of bounds, before anything is loaded.

    Args:
        max_new_tokens: As the command line gave it.
        stop: Stop strings.
        sampling: Fields of SamplingOptions; None where not given.

    Returns:
        Those that were given, for `Model.stream`.

    Raises:
        RequestError: One of them is.
    """
    given = {name: value for name, value in sampling.items() if value is not None}
    SamplingOptions(**given)  # type: ignore[arg-type]
    if max_new_tokens is not None:
        check_max_new_tokens(max_new_tokens)
    return {**given, "max_new_tokens": max_new_tokens, "stop": read_stops(stop)}


def convert_pickle(model: str, *, allowed: bool) -> None:
    """Converts a folder of pickles, where that is allowed, showing how far it is.

    Whatever reads the folder next finds what this made.

    Raises:
        OomproofError: As models.pickled.unpickled raises it.
    """
    if not allowed or model == BUNDLED:
        return
    try:
        path = Path(model).expanduser()
        is_folder = path.is_dir()
    except (RuntimeError, OSError, ValueError):
        return  # what is wrong with the name is told when it is resolved
    if not is_folder:
        return
    from oomproof.cli.render import loading_progress
    from oomproof.models.pickled import unpickled

    with loading_progress() as progress:
        unpickled(path, partial(progress, "convert"))


def wants_worker(asked: bool | None, plan: Plan) -> bool:
    """Whether a plan's model gets a process of its own.

    Unless told, it does where a GPU can fail under it; on a processor there is no such fault, and
    a second process costs its start and its memory.
    """
    if asked is not None:
        return asked
    return os.name == "posix" and any(d.kind == "cuda" for d in plan.devices_in_use)


def parse_max_memory(
    values: list[str] | None,
) -> dict[int | Literal["cpu"], int | str]:
    """Reads ["0=20GiB", "cpu=64GiB"].

    Raises:
        InputError: Not of the form INDEX=SIZE.
    """
    limits: dict[int | Literal["cpu"], int | str] = {}
    for value in values or []:
        index, separator, size = value.partition("=")
        index = index.strip()
        if separator and index == "cpu":
            limits["cpu"] = size
            continue
        if not separator or not index.isdecimal() or len(index) > MAX_DEVICE_INDEX_DIGITS:
            raise InputError(
                f"max-memory {value[:80]!r} is not INDEX=SIZE", remedy='write "0=20GiB"'
            )
        limits[int(index)] = size
    return limits


def planned(model: str, **asked: Any) -> Plan:
    """The plan of `session.plan`; where it measures a calibration first, with a bar on stderr."""
    from oomproof import session

    if asked.get("calibration") is None:
        return session.plan(model, **asked)
    from oomproof.cli.render import loading_progress

    with loading_progress() as progress:
        return session.plan(model, progress=progress, **asked)
