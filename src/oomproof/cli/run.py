"""`oomproof run`: plan, load, answer one prompt."""

from __future__ import annotations

import json as json_format
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from oomproof.cli import options
from oomproof.errors import RequestError
from oomproof.guarding.fallback import read_fallback

if TYPE_CHECKING:
    from oomproof.engine.model import Model, Stream

PromptArgument = Annotated[
    str | None,
    typer.Argument(help="What to answer; read from stdin where it is left out or -."),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Continue the text as it stands, without a chat template.")
]
Memory = Annotated[
    bool, typer.Option("--memory", help="Print predicted against measured memory at the end.")
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        help="With --json: log-probabilities of each token and of the N most likely beside it.",
        metavar="N",
        show_default=False,
    ),
]


def run(
    model: options.Model,
    prompt: PromptArgument = None,
    raw: Raw = False,
    memory: Memory = False,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    logprobs: Logprobs = None,
    format: options.Format = "auto",
    kv_format: options.KVFormat = "auto",
    context: options.Context = None,
    max_memory: options.MaxMemory = None,
    reserve: options.Reserve = None,
    cap: options.Cap = None,
    engine: options.Engine = "auto",
    offload: options.Offload = "none",
    force: options.Force = False,
    search: options.Search = False,
    calibration: options.Calibration = None,
    adapter: options.Adapter = None,
    fallback: options.Fallback = None,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    trust_remote_code: options.TrustRemoteCode = False,
    worker: options.Worker = None,
    json: options.Json = False,
) -> None:
    """Plan a model, load it as planned, and stream the answer to one prompt."""
    from oomproof import session
    from oomproof.cli.render import (
        answer_as_json,
        loading_progress,
        print_event,
        print_memory,
        print_plan_line,
        print_speed,
    )

    text = _read_prompt(prompt)
    # Wrong options are told before anything is loaded.
    sampling = options.check_sampling(
        max_new_tokens=max_new_tokens,
        stop=stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        logprobs=logprobs,
    )
    if logprobs is not None and not json:
        raise RequestError("--logprobs prints nothing without --json", remedy="add --json")
    allowed = read_fallback(fallback)
    session.require_run_packages()
    options.convert_pickle(model, allowed=allow_pickle)
    made = options.planned(
        model,
        format=format,
        kv_format=kv_format,
        context=context,
        max_memory=options.parse_max_memory(max_memory),
        reserve=reserve or 0,
        cap=cap,
        engine=engine,
        offload=offload,
        force=force,
        search=search,
        calibration=calibration,
        adapter=adapter,
        revision=revision,
        allow_pickle=allow_pickle,
    )
    print_plan_line(made)
    with loading_progress() as progress:
        loaded = session.load(
            made,
            progress=progress,
            fallback=allowed,
            on_event=print_event,
            trust_remote_code=trust_remote_code,
            worker=options.wants_worker(worker, made),
        )
    with loaded:
        stream = loaded.stream(text, raw=raw, **sampling)
        try:
            for piece in stream:
                if not json:
                    typer.echo(piece, nl=False)
        except KeyboardInterrupt:
            stream.cancel()
        if json:
            answer = answer_as_json(loaded, stream)
            typer.echo(answer if logprobs is None else _with_logprobs(answer, loaded, stream))
        else:
            typer.echo()
            print_speed(stream)
        if memory:
            print_memory(loaded.plan, loaded.measured_terms())


def _with_logprobs(answer: str, loaded: Model, stream: Stream) -> str:
    """The JSON of an answer with the log-probabilities of its tokens."""

    def entry(token: int, logprob: float) -> dict[str, object]:
        return {
            "token": token,
            "text": loaded.tokenizer.decode([token]),
            "logprob": logprob,
        }

    tokens = [
        {**entry(one.token, one.logprob), "top": [entry(*other) for other in one.top]}
        for one in stream.logprobs
    ]
    return json_format.dumps({**json_format.loads(answer), "logprobs": tokens}, indent=2)


def _read_prompt(prompt: str | None) -> str:
    """The prompt from the command line, or all of stdin.

    Raises:
        RequestError: There is neither, or stdin is not text.
    """
    if prompt is None or prompt == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise RequestError("no prompt", remedy="give it as an argument or on stdin")
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"stdin is not UTF-8 text: {error}") from None
    else:
        try:
            # A byte of the command line that is no UTF-8 arrives as a lone surrogate.
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is not UTF-8 text: {error.reason}") from None
    if not prompt.strip():
        raise RequestError("the prompt is empty", remedy="give it as an argument or on stdin")
    return prompt
