"""Our engine as a model of lm-evaluation-harness; with its stub where it is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from oomproof.errors import InputError, RequestError
from oomproof.models.resolve import bundled_folder
from tests import harness_stub
from tests.harness_stub import instance

TEXT = "It was a dark night, and the rain fell upon the sea. The captain stood at the wheel"


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    harness_stub.install()
    from lm_eval.api.registry import model_registry

    import oomproof.harness  # noqa: F401 - registers the model

    arguments = {"pretrained": "tiny", "format": "fp32", "max_length": 128}
    config = {"batch_size": 2, "max_batch_size": None, "device": "cuda:0"}
    found = model_registry.get("oomproof").create_from_arg_obj(arguments, config)
    yield found
    found._model.close()


@pytest.fixture(scope="module")
def peer() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(bundled_folder(), dtype=torch.float32)


def loglikelihood(peer: Any, tokens: list[int], first: int) -> tuple[float, bool]:
    with torch.inference_mode():
        logprobs = torch.log_softmax(peer(torch.tensor([tokens[:-1]])).logits[0], dim=1)
    wanted = torch.tensor(tokens[1:])
    own = logprobs.gather(1, wanted.unsqueeze(1)).squeeze(1)[first - 1 :]
    return float(own.sum()), bool((logprobs.argmax(dim=1) == wanted)[first - 1 :].all())


def test_continuations_are_as_likely_as_in_transformers(model: Any, peer: Any) -> None:
    pairs = [(TEXT, " and spoke"), (TEXT + " ", "of the"), ("", "The king"), (TEXT, " of the ship")]
    found = model.loglikelihood([instance(*pair) for pair in pairs])
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        whole = model.tok_encode(context + continuation)
        first = len(model.tok_encode(context.rstrip())) if context else 1
        expected, expected_greedy = loglikelihood(peer, whole, first)
        assert value == pytest.approx(expected, abs=2e-3)
        assert is_greedy is expected_greedy


def test_what_the_model_would_say_is_greedy(model: Any) -> None:
    (answer,) = model.generate_until([instance(TEXT, {"max_gen_toks": 3})])
    tokens = model.tok_encode(TEXT)
    ((_, is_greedy),) = model._loglikelihood_tokens(
        [(None, tokens, model.tok_encode(answer, add_special_tokens=False))]
    )
    assert is_greedy


def test_long_contexts_are_cut_on_the_left(model: Any, peer: Any) -> None:
    tokens = model.tok_encode(TEXT * 12, add_special_tokens=False)
    ((value, _),) = model._loglikelihood_tokens([(None, tokens[:-4], tokens[-4:])])
    expected, _ = loglikelihood(peer, tokens[-129:], 125)
    assert value == pytest.approx(expected, abs=2e-3)


def test_whole_texts_are_predicted_token_by_token(model: Any, peer: Any) -> None:
    long = TEXT * 12
    found = model.loglikelihood_rolling([instance(TEXT), instance(long)])
    expected, _ = loglikelihood(peer, model.tok_encode(TEXT), 1)
    assert found[0] == pytest.approx(expected, abs=2e-3)
    assert found[1] < 3 * found[0]


def test_answers_end_at_stops_and_bounds_and_come_in_order(model: Any) -> None:
    free = {"max_gen_toks": 12}
    first, second, cut = model.generate_until(
        [
            instance(TEXT, free),
            instance("The king said", {**free, "do_sample": False, "temperature": 0.7}),
            instance(TEXT, {**free, "until": [" ", ""]}),
        ]
    )
    alone = model.generate_until([instance("The king said", free)])
    assert [second] == alone
    assert cut == first.split(" ")[0]
    assert first != second


def test_texts_begin_as_documents_do_once(model: Any) -> None:
    bos = model.prefix_token_id
    assert model.tok_encode("a")[0] == bos
    assert model.tok_encode("a", add_special_tokens=False)[0] != bos
    assert model.tok_encode("<|bos|>a").count(bos) == 1
    chat = model.apply_chat_template([{"role": "user", "content": "Who goes there?"}])
    assert model.tok_encode(chat).count(bos) == 1
    assert model.chat_template(True)
    assert model.tokenizer_name
    assert model.eot_token_id == 3


def test_what_is_not_understood_is_refused(model: Any) -> None:
    from oomproof.harness import OomproofLM

    with pytest.raises(InputError, match="'num_beams'"):
        model.generate_until([instance(TEXT, {"num_beams": 4})])
    with pytest.raises(InputError, match="max_batch_size 64 is not"):
        OomproofLM("tiny", max_batch_size=64)
    with pytest.raises(InputError, match=r"model_args: .*'dtype'"):
        OomproofLM("tiny", dtype="float16")
    with pytest.raises(RequestError, match="has no room in a context"):
        model._loglikelihood_tokens([(None, [5], [6] * 300)])
