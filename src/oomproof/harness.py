"""Our engine as a model of lm-evaluation-harness: `pip install 'oomproof[run,harness]'`.

    oomproof-lm-eval --model oomproof --model_args pretrained=tiny,format=nf4-dq --tasks …

The harness (0.4.13) finds models in its own registry and looks up no entry points; so this is its
command line, with one model more. From Python, importing this module is enough for
`lm_eval.simple_evaluate(model="oomproof", …)`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval.models  # noqa: F401 - the harness' own models are registered first
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from oomproof import session
from oomproof.compat.tokenizer import TransformersTokenizer
from oomproof.errors import InputError, OomproofError, RequestError

DEFAULT_NEW_TOKENS = 256
"""Bound of an answer where a task sets none, as in the harness' own models."""
_BOUNDS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class OomproofLM(TemplateLM):  # type: ignore[misc]
    """A model loaded by a plan.

    Args:
        pretrained: A folder, a hub id, a name of the catalog, or "tiny".
        batch_size: Requests at once; answers are generated, and logits computed, so many at a time.
        context: Tokens of a request; None for min(8192, the model's maximum).
        max_length: The harness' word for `context`.
        device: Not used, since the harness always gives one: the plan says where the model goes.
        max_batch_size: None: the plan's concurrency does not change.
        options: The others of `oomproof.plan`: format, kv_format, max_memory, revision, ….

    Raises:
        InputError: An option that is unknown or that a plan decides.
        OomproofError: As `oomproof.load` does.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 1,
        context: int | str | None = None,
        max_length: int | None = None,
        device: str | None = None,  # noqa: ARG002
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise InputError(
                f"max_batch_size {max_batch_size} is not for this model: the requests at once are "
                "planned",
                remedy="give --batch_size alone",
            )
        options.setdefault("engine", "native")
        try:
            self._model = session.load(
                pretrained,
                context=max_length if context is None else context,
                concurrency=batch_size,
                **options,
            )
        except TypeError as error:
            raise InputError(
                f"model_args: {error}", remedy="use the options of oomproof.plan"
            ) from (error)
        tokenizer = self._model.tokenizer
        assert isinstance(tokenizer, TransformersTokenizer)
        self._text: TransformersTokenizer = tokenizer
        self.batch_size = self._model.plan.concurrency

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        found = self._text.eos_token_id
        if found is None:
            raise InputError("this model has no token that ends a document")
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context stands for."""
        return self._text.prefix[0] if self._text.prefix else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer."""
        return self._model.plan.context

    @property
    def tokenizer_name(self) -> str:
        """What caches of requests are kept under."""
        return self._model.plan.source.path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens; by default with those that begin a document, where the text does not have them.

        Args:
            string: The text.
            add_special_tokens: False for without.
            kwargs: None is known.
        """
        if kwargs:
            raise InputError(f"tok_encode knows no {', '.join(kwargs)}")
        prefix, tokens = list(self._text.prefix), self._text.encode_bare(string)
        if add_special_tokens is False or tokens[: len(prefix)] == prefix:
            return tokens
        return prefix + tokens

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's template writes it."""
        return self._text.render_chat(chat_history, begins_answer=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template; none is chosen by name."""
        if isinstance(chat_template, str):
            raise InputError(f"chat template {chat_template[:40]!r}: models have one here")
        return self._text.chat_template if chat_template else ""

    def loglikelihood_rolling(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,  # noqa: ARG002 - the harness' signature
    ) -> list[float]:
        """Log-likelihood of whole texts, each token after as much of the text as fits."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,  # noqa: ARG002 - the harness' signature
    ) -> list[str]:
        """Answers, `batch_size` of them at once."""
        found: list[str] = []
        for first in range(0, len(requests), self.batch_size):
            batch = requests[first : first + self.batch_size]
            streams = [self._stream(*request.args) for request in batch]
            for request, stream in zip(batch, streams, strict=True):
                found.append("".join(stream))
                self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _stream(self, context: str, asked: Mapping[str, Any]) -> Any:
        options = read_generation(asked)
        most = min(options.pop("max_new_tokens"), self.max_length - 1)
        tokens = self.tok_encode(context)[-(self.max_length - most) :]
        return self._model.stream(tokens, max_new_tokens=most, **options)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,  # noqa: ARG002 - the harness' signature
        **kwargs: Any,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        found = []
        for key, context, continuation in requests:
            found.append(self._score(context, continuation))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[-1])
        return found

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood of a continuation, and whether each token is the most likely one."""
        tokens = [*context, *continuation][-(self.max_length + 1) :]
        first = len(tokens) - len(continuation)
        if first < 1:
            raise RequestError(
                f"a continuation of {len(continuation):,} tokens has no room in a context of "
                f"{self.max_length:,}",
                remedy="give a larger context in --model_args",
            )
        if not continuation:
            return 0.0, True
        scores = self._model.score(tokens, first)
        return sum(one.logprob for one in scores), all(one.is_most_likely for one in scores)


def read_generation(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as options of `Model.stream`.

    Raises:
        InputError: One is unknown here.
    """
    left = dict(asked)
    until = left.pop("until", None) or []
    bounds = [left.pop(name) for name in _BOUNDS if left.get(name) is not None]
    samples = left.pop("do_sample", None)
    options = {name: left.pop(name) for name in _SAMPLING if left.get(name) is not None}
    unknown = [name for name, value in left.items() if value is not None and name not in _BOUNDS]
    if unknown:
        raise InputError(
            f"generation_kwargs {', '.join(map(repr, unknown))} are not known here",
            remedy=f"use until, do_sample, {', '.join((*_BOUNDS[:1], *_SAMPLING))}",
        )
    if samples is False or (samples is None and not options.get("temperature")):
        options = {"temperature": 0.0}
    stops = [until] if isinstance(until, str) else list(until)
    return {
        **options,
        "stop": [stop for stop in stops if stop],
        "max_new_tokens": int(bounds[0]) if bounds else DEFAULT_NEW_TOKENS,
    }


model_registry.register("oomproof", target=OomproofLM)


def main() -> None:
    """The harness' command line, with `--model oomproof`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except OomproofError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
