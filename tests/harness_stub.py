"""The part of lm-evaluation-harness (0.4.13) that our model of it touches, where it is absent."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any


class Hook:
    """lm_eval.api.model.CacheHook without a cache."""

    def add_partial(self, attr: str, req: Any, res: Any) -> None: ...


class TemplateLM:
    """lm_eval.api.model.TemplateLM, as far as a causal model goes."""

    prefix_token_id: int

    def __init__(self) -> None:
        self.cache_hook = Hook()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        raise NotImplementedError

    def _loglikelihood_tokens(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        pairs = []
        for context, continuation in (request.args for request in requests):
            if not context:
                alone = self.tok_encode(continuation, add_special_tokens=False)
                pairs.append(((context, continuation), [self.prefix_token_id], alone))
                continue
            spaces = len(context) - len(context.rstrip())
            whole = self.tok_encode(context + continuation)
            before = self.tok_encode(context[: len(context) - spaces])
            pairs.append(((context, continuation), before, whole[len(before) :]))
        return self._loglikelihood_tokens(pairs)

    @classmethod
    def create_from_arg_obj(cls, arguments: dict[str, Any], config: dict[str, Any]) -> Any:
        return cls(**arguments, **{k: v for k, v in config.items() if v is not None})


class Registry:
    """lm_eval.api.registry.Registry."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def register(self, *aliases: str, target: Any) -> None:
        self.found.update(dict.fromkeys(aliases, target))

    def get(self, name: str) -> Any:
        return self.found[name]


def rolling_windows(
    token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    """lm_eval.utils.get_rolling_token_windows."""
    predicted = min(max_seq_len, len(token_list))
    yield [prefix_token, *token_list[: predicted - 1]], token_list[:predicted]
    while predicted < len(token_list):
        count = min(len(token_list) - predicted, max_seq_len - context_len + 1)
        end = predicted + count
        yield token_list[end - max_seq_len - 1 : end - 1], token_list[end - count : end]
        predicted = end


def disjoint(pair: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """lm_eval.utils.make_disjoint_window."""
    inputs, targets = pair
    return inputs[: len(inputs) - (len(targets) - 1)], targets


def install() -> None:
    """Puts the stub in the harness' place, where that is not installed."""
    if "lm_eval" in sys.modules or find_spec("lm_eval") is not None:
        return
    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.models": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {"model_registry": Registry()},
        "lm_eval.utils": {
            "get_rolling_token_windows": rolling_windows,
            "make_disjoint_window": disjoint,
        },
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module


def instance(*arguments: Any) -> Any:
    """lm_eval.api.instance.Instance: what a task asks."""
    return SimpleNamespace(args=arguments)
