"""`oomproof chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from oomproof.cli import options
from oomproof.errors import LadderExhaustedError, RequestError, WorkerDownError, WorkerError
from oomproof.guarding.fallback import read_fallback

if TYPE_CHECKING:
    from oomproof.engine.model import Model

_HELP = """\
/help    this help
/clear   forget the conversation
/plan    what the model holds where
/memory  predicted against measured memory
/quit    leave (so does Ctrl-D)
Ctrl-C stops the answer that is on its way."""


def chat(
    model: options.Model,
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
) -> None:
    """Talk to a model; it remembers the conversation as far as the context reaches."""
    from oomproof import session
    from oomproof.cli.render import (
        loading_progress,
        print_event,
        print_memory,
        print_plan,
        print_plan_line,
        say,
    )

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
    )
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
    apart = options.wants_worker(worker, made)
    with loading_progress() as progress:
        loaded = session.load(
            made,
            progress=progress,
            fallback=allowed,
            on_event=print_event,
            trust_remote_code=trust_remote_code,
            worker=apart,
        )
    say("/help for help, Ctrl-D to leave")
    history: list[dict[str, str]] = []
    with loaded:
        while (line := _read_line()) is not None:
            match line.strip():
                case "":
                    continue
                case "/quit" | "/exit":
                    break
                case "/help":
                    say(_HELP)
                case "/clear":
                    history.clear()
                    say("forgotten")
                case "/plan":
                    print_plan(loaded.plan)
                case "/memory":
                    print_memory(loaded.plan, loaded.measured_terms())
                case command if command.startswith("/"):
                    say(f"no command {command.split()[0]}; /help lists them")
                case text:
                    history.append({"role": "user", "content": text})
                    _answer(loaded, history, outlives=apart, **sampling)


def _read_line() -> str | None:
    """The next line of the user, None at the end; Ctrl-C drops a line half written."""
    while True:
        try:
            if sys.stdin.isatty():
                sys.stderr.write("\n> ")
                sys.stderr.flush()
            line = sys.stdin.buffer.readline()
        except KeyboardInterrupt:
            sys.stderr.write("\n(Ctrl-D or /quit to leave)\n")
            continue
        if not line:
            return None
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            sys.stderr.write(f"error: this line is not UTF-8 text: {error.reason}\n")


def _answer(
    loaded: Model, history: list[dict[str, str]], *, outlives: bool, **sampling: Any
) -> None:
    """Streams one answer and appends it to the history; one that is refused or lost leaves it.

    Args:
        loaded: The model.
        history: Ends with the question.
        outlives: Whether a failed engine is replaced.
        sampling: Options of `Model.stream`.
    """
    from oomproof.cli.render import say

    stream = None
    try:
        stream = loaded.stream(history, **sampling)
        for piece in stream:
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        if stream is None:
            raise
        stream.cancel()
    except RequestError as error:
        history.pop()
        say(f"error: {error}")
        say("/clear forgets the conversation")
        return
    except WorkerDownError:
        raise
    except (WorkerError, LadderExhaustedError) as error:
        if isinstance(error, LadderExhaustedError) and not outlives:
            raise
        history.pop()
        typer.echo()
        say(f"error: {error}")
        say("the answer is lost and the question forgotten; ask again")
        return
    typer.echo()
    history.append({"role": "assistant", "content": stream.text})
