"""The native engine on a CPU: transformers' tokens in float32, whatever the company and chunks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from oomproof.engine.messages import FinishedEvent, Request, SamplingOptions, TokenEvent
from oomproof.engine.native.engine import NativeEngine
from oomproof.engine.native.load import load_engine
from oomproof.engine.native.pipeline import Pipeline
from oomproof.errors import (
    CheckpointError,
    NotRunnableError,
    PlanMismatchError,
    RequestError,
)
from oomproof.formats import get_format
from oomproof.hardware.probe import probe
from oomproof.models.resolve import bundled_folder, resolve, with_checkpoint
from oomproof.quantization.handlers import handler
from oomproof.session import plan
from tests.compat.checkpoints import WINDOW, random_checkpoint

GREEDY = SamplingOptions(temperature=0)
FAMILIES = (
    "llama",
    "llama, tied",
    "llama, stretched",
    "granite",
    "mistral",
    "qwen2",
    "qwen2, sliding",
    "qwen2, yarn",
    "qwen3",
)
FORMATS = ("fp32", "int8", "int4", "nf4", "nf4-dq", "nf4-g16", "fp4", "fp4-dq")


def engine_of(folder: Path, **options: Any) -> NativeEngine:
    spec = with_checkpoint(resolve(str(folder)))
    planned = plan(folder, engine="native", **options)
    return load_engine(planned, spec, probe(), folder)


def request(
    name: str, prompt: Sequence[int], new_tokens: int, sampling: SamplingOptions = GREEDY
) -> Request:
    return Request(
        id=name, prompt_tokens=tuple(prompt), max_new_tokens=new_tokens, sampling=sampling
    )


def run(engine: NativeEngine, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Each request's answer, all submitted at once."""
    answers: dict[str, list[int]] = {}
    for one in requests:
        answers[one.id] = []
        engine.submit(one)
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                answers[event.request_id].append(event.token)
    return answers


def prompts(count: int, vocab_size: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        torch.randint(4, vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]


def reference_model(
    folder: Path,
    format_name: str,
    encode: Callable[[str, torch.Tensor], dict[str, torch.Tensor]] | None = None,
) -> Any:
    """transformers' float32 model with the weights that the format stands for.

    `encode` makes the codes; the reference does where none is given.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if get_format(format_name).is_quantized:
        handled = handler(format_name)
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    weight = module.weight.data.bfloat16()
                    shape = (weight.shape[0], weight.shape[1])
                    parts = encode(format_name, weight) if encode else handled.encode(weight)
                    module.weight.data = handled.decode(parts, shape, torch.float32)
    return model.eval()


@torch.inference_mode()
def assert_greedy(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Each token of the answer is the most likely one after what comes before it.

    That is what greedy generation means, and one forward shows it. A tie to within rounding may go
    either way.
    """
    whole = torch.tensor([[*prompt, *answer]])
    logits = model(whole).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    behind = (logits.max(dim=1).values - chosen) / logits.std(dim=1)
    assert float(behind.max()) < 1e-4


def test_the_bundled_models_greedy_tokens_are_those_of_transformers() -> None:
    assert_format("fp32", requests=20, new_tokens=200)


@pytest.mark.slow
@pytest.mark.parametrize("format_name", FORMATS)
def test_two_hundred_tokens_of_every_format_are_those_of_its_dequantized_weights(
    format_name: str,
) -> None:
    assert_format(format_name, requests=20, new_tokens=200)


@pytest.mark.parametrize("format_name", FORMATS[1:])
def test_a_formats_greedy_tokens_are_those_of_its_dequantized_weights(format_name: str) -> None:
    assert_format(format_name, requests=4, new_tokens=24)


def assert_format(format_name: str, *, requests: int, new_tokens: int) -> None:
    """Greedy tokens on the bundled model are those of transformers, in float32."""
    compute = {} if format_name == "fp32" else {"compute_dtype": "float32", "kv_format": "fp32"}
    engine = engine_of(
        bundled_folder(), format=format_name, context=512, concurrency=requests, **compute
    )
    asked = prompts(requests, 2048, 100)
    answers = run(engine, [request(str(n), prompt, new_tokens) for n, prompt in enumerate(asked)])
    model = reference_model(bundled_folder(), format_name)
    for number, prompt in enumerate(asked):
        assert len(answers[str(number)]) == new_tokens
        assert_greedy(model, prompt, answers[str(number)])
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", family)
    engine = engine_of(folder, format="fp32", context=256, concurrency=3)
    asked = prompts(5, 2048, 3 * WINDOW)
    answers = run(engine, [request(str(n), prompt, 60) for n, prompt in enumerate(asked)])
    model = reference_model(folder, "fp32")
    for number, prompt in enumerate(asked):
        assert_greedy(model, prompt, answers[str(number)])
    engine.close()


def test_company_changes_no_answer() -> None:
    asked = prompts(8, 2048, 60)
    together = engine_of(bundled_folder(), format="fp32", context=256, concurrency=8)
    answers = run(together, [request(str(n), prompt, 40) for n, prompt in enumerate(asked)])
    together.close()
    alone = engine_of(bundled_folder(), format="fp32", context=256)
    for number, prompt in enumerate(asked):
        assert run(alone, [request("x", prompt, 40)])["x"] == answers[str(number)]
    alone.close()


@pytest.mark.parametrize("format_name", ["fp32", "nf4-dq", "int8"])
def test_chunks_and_slices_of_up_change_no_answer(
    format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = {} if format_name == "fp32" else {"compute_dtype": "float32", "kv_format": "fp32"}
    # Of 4 to 400 tokens: gate and up at once, slice by slice, and in a second chunk.
    asked = [prompt * 4 for prompt in prompts(4, 2048, 100)]
    answers = []
    for chunk, rows in ((2048, 4096), (256, 256)):
        monkeypatch.setattr("oomproof.memory.native.CHUNK_TOKENS", chunk)
        monkeypatch.setattr("oomproof.memory.slices.UP_ROWS", rows)
        engine = engine_of(
            bundled_folder(), format=format_name, context=512, concurrency=2, **compute
        )
        assert engine._chunk == min(chunk, 512)
        answers.append(run(engine, [request(str(n), one, 20) for n, one in enumerate(asked)]))
        engine.close()
    assert answers[0] == answers[1]


PAIR = ((11, 7, 93, 500, 12), (40, 41, 42))


@pytest.fixture(params=[0, 1, 2], ids=["in turn", "one step ahead", "before tokens come"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are launched before the tokens of the last are handed out, as on GPUs; or
    before they have come, as on one."""
    launches_ahead: bool = request.param > 0
    monkeypatch.setattr(Pipeline, "is_recorded", launches_ahead)
    monkeypatch.setattr(Pipeline, "is_one_graph", request.param > 1)
    return launches_ahead


def test_steps_that_are_launched_ahead_answer_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come, end, are cancelled and wait, in whatever order."""
    chooser = random.Random(7)
    plans = [
        (chooser.randint(0, 25), chooser.randint(1, 30), chooser.randint(1, 12), chooser.random())
        for _ in range(24)
    ]
    found, went_on = [], []
    decode_on = Pipeline.decode_on

    def noted(self: Pipeline, rows: int, *, greedy: bool) -> int:
        went_on.append(rows)
        return decode_on(self, rows, greedy=greedy)

    monkeypatch.setattr(Pipeline, "decode_on", noted)
    for launches_ahead, goes_on in ((False, False), (True, False), (True, True)):
        went_on.clear()
        monkeypatch.setattr(Pipeline, "is_recorded", launches_ahead)
        monkeypatch.setattr(Pipeline, "is_one_graph", goes_on)
        engine = engine_of(bundled_folder(), format="fp32", context=256, concurrency=3)
        told: dict[str, list[Any]] = {str(n): [] for n in range(len(plans))}
        turn = 0
        while turn <= 25 or not engine.idle:
            for n, (begin, length, new_tokens, luck) in enumerate(plans):
                if begin == turn:
                    sampling = GREEDY if luck < 0.5 else SamplingOptions(seed=n, top_k=20)
                    # Some end with a token that nobody knew of when the next step was launched.
                    stops = frozenset(range(0, 2048, 7)) if n % 3 == 0 else frozenset()
                    asked = request(str(n), range(5, 5 + length), new_tokens, sampling)
                    engine.submit(replace(asked, stop_tokens=stops))
                if luck > 0.8 and turn == begin + 6:
                    engine.cancel(str(n))
            for event in engine.step():
                told[event.request_id].append(event)
            turn += 1
        engine.close()
        found.append(told)
        assert bool(went_on) == goes_on
    assert {told["0"][-1].reason for told in found} <= {"stop", "length"}
    assert any(events[-1].reason == "stop" for told in found for events in told.values())
    for n, (_, _, new_tokens, _) in enumerate(plans):
        one, *others = (told[str(n)] for told in found)
        for events in (one, *others):
            tokens, finished = events[:-1], events[-1]
            assert isinstance(finished, FinishedEvent)
            assert all(isinstance(event, TokenEvent) for event in tokens)
            assert finished.new_tokens == len(tokens) <= new_tokens
            assert (finished.reason == "length") <= (len(tokens) == new_tokens)
        # A cancelled one may end a token earlier or later.
        for two in others:
            shared = min(len(one), len(two)) - 1
            assert [event.token for event in one[:shared]] == [
                event.token for event in two[:shared]
            ]
            assert abs(len(one) - len(two)) <= 1


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("cut", [1, 2, 7])
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SamplingOptions(seed=5, temperature=0.9, frequency_penalty=0.4, top_k=30)],
    ids=["greedy", "sampled"],
)
def test_an_answer_that_is_replayed_goes_on_bit_for_bit(
    cut: int, sampling: SamplingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, where a prompt's products are rounded differently from a token's."""
    engine = engine_of(bundled_folder(), format="bf16", context=256, concurrency=3)
    asked = [request(name, prompt, 16, sampling) for name, prompt in zip("ab", PAIR, strict=True)]
    calm = run(engine, asked)
    fed: list[tuple[int, ...]] = []
    prefill = Pipeline.prefill

    def noted(self: Pipeline, tokens: Sequence[int], *rest: Any, **options: Any) -> int | None:
        fed.append(tuple(tokens))
        return prefill(self, tokens, *rest, **options)

    monkeypatch.setattr(Pipeline, "prefill", noted)
    resumed = [
        replace(
            one,
            prompt_tokens=(*one.prompt_tokens, *calm[one.id][:cut]),
            max_new_tokens=16 - cut,
            resumed_tokens=cut,
            replays=True,
        )
        for one in asked
    ]
    # Its slots were another's before, with other options.
    run(engine, [request("x", [5], 2, SamplingOptions(seed=1, repetition_penalty=1.5))])
    fed.clear()
    found = run(engine, resumed)
    assert found == {name: answer[cut:] for name, answer in calm.items()}
    assert fed == [one.prompt_tokens for one in asked]
    engine.close()


def test_a_replayed_answer_can_be_cancelled_and_waits_for_company() -> None:
    engine = engine_of(bundled_folder(), format="fp32", context=256, concurrency=2)
    calm = run(engine, [request("a", PAIR[0], 12)])["a"]
    again = replace(request("a", (*PAIR[0], *calm[:8]), 4), resumed_tokens=8, replays=True)
    engine.submit(again)
    engine.submit(request("b", PAIR[1], 3))
    told: list[Any] = []
    for _ in range(4):
        told += engine.step()
    engine.cancel("a")
    while not engine.idle:
        told += engine.step()
    ends = {event.request_id: event for event in told if isinstance(event, FinishedEvent)}
    assert (ends["a"].reason, ends["a"].new_tokens) == ("cancelled", 0)
    assert (ends["b"].reason, ends["b"].new_tokens) == ("length", 3)
    assert run(engine, [again])["a"] == calm[8:]
    engine.close()


@pytest.mark.usefixtures("ahead")
def test_more_requests_than_slots_wait_for_their_turn() -> None:
    engine = engine_of(bundled_folder(), format="bf16", context=256, concurrency=2)
    answers = run(engine, [request(str(n), [5, 6, 7], 10) for n in range(7)])
    assert {len(answer) for answer in answers.values()} == {10}
    assert len({tuple(answer) for answer in answers.values()}) == 1
    engine.close()


@pytest.mark.usefixtures("ahead")
def test_a_cancelled_request_ends_and_frees_its_pages() -> None:
    engine = engine_of(bundled_folder(), format="bf16", context=256)
    engine.submit(request("first", [5, 6, 7], 100))
    engine.submit(request("second", [5, 6, 7], 3))
    engine.step()
    engine.cancel("first")
    ended: list[FinishedEvent] = []
    while not engine.idle:
        ended += [event for event in engine.step() if isinstance(event, FinishedEvent)]
    assert [(event.request_id, event.reason) for event in ended] == [
        ("first", "cancelled"),
        ("second", "length"),
    ]
    engine.close()


@pytest.mark.usefixtures("ahead")
def test_prompt_and_answer_may_fill_the_context_and_no_more() -> None:
    engine = engine_of(bundled_folder(), format="bf16", context=256)
    assert len(run(engine, [request("x", [7] * 250, 6)])["x"]) == 6
    with pytest.raises(RequestError, match="do not fit in the planned context of 256"):
        engine.submit(request("y", [7] * 250, 7))
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.submit(request("z", [2048], 1))
    engine.close()


@pytest.mark.usefixtures("ahead")
def test_a_stop_token_ends_the_answer_and_is_not_part_of_it() -> None:
    engine = engine_of(bundled_folder(), format="fp32", context=256)
    whole = run(engine, [request("x", [5, 6, 7], 30)])["x"]
    stop = whole[10]
    stopped = Request(
        id="y",
        prompt_tokens=(5, 6, 7),
        max_new_tokens=30,
        sampling=GREEDY,
        stop_tokens=frozenset({stop}),
    )
    assert run(engine, [stopped])["y"] == whole[: whole.index(stop)]
    engine.close()


@pytest.mark.usefixtures("ahead")
def test_logprobs_are_those_of_the_models_own_distribution() -> None:
    engine = engine_of(bundled_folder(), format="fp32", context=256)
    options = SamplingOptions(temperature=0.7, top_k=5, seed=3, logprobs=4)
    engine.submit(request("x", [5, 6, 7], 12, options))
    events: list[TokenEvent] = []
    while not engine.idle:
        events += [event for event in engine.step() if isinstance(event, TokenEvent)]
    tokens = [event.token for event in events]
    model = reference_model(bundled_folder(), "fp32")
    with torch.inference_mode():
        logits = model(torch.tensor([[5, 6, 7, *tokens]])).logits
    expected = logits[0, 2:-1].log_softmax(dim=-1)
    for row, event in zip(expected, events, strict=True):
        assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-3)
        assert [token for token, _ in event.top_logprobs] == row.topk(4).indices.tolist()
    engine.close()


def test_an_fp8_cache_changes_little_and_takes_half() -> None:
    engine = engine_of(bundled_folder(), format="bf16", kv_format="fp8", context=256)
    whole = engine_of(bundled_folder(), format="bf16", context=256)
    for prompt in prompts(3, 2048, 60):
        one = request("x", prompt, 1)
        assert run(engine, [one]) == run(whole, [one])
    [small], [large] = engine.measured_terms().values(), whole.measured_terms().values()
    assert 2 * small.kv_cache == large.kv_cache
    engine.close()
    whole.close()


def test_a_tied_head_that_the_files_hold_too_must_be_the_embedding(tmp_path: Path) -> None:
    def with_head(tensors: dict[str, torch.Tensor], change: float) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change

    same = random_checkpoint(tmp_path / "same", "llama, tied", lambda t: with_head(t, 0.0))
    engine = engine_of(same, format="bf16", context=256)
    assert len(run(engine, [request("x", [5], 3)])["x"]) == 3
    engine.close()
    other = random_checkpoint(tmp_path / "other", "llama, tied", lambda t: with_head(t, 1.0))
    with pytest.raises(CheckpointError, match="ties lm_head to the embedding"):
        engine_of(other, format="bf16", context=256)


def test_a_damaged_value_is_found_and_named(tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf

    folder = random_checkpoint(tmp_path / "model", "llama", damage)
    for format_name in ("bf16", "nf4-dq", "int8"):
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
            engine_of(folder, format=format_name, context=256)


@pytest.mark.parametrize("term", ["weights", "kv_cache", "workspace"])
def test_a_plan_that_promises_less_than_the_model_takes_is_refused(term: str) -> None:
    planned = plan("tiny", format="int8", context=256)
    [device] = planned.devices
    terms = replace(device.terms, **{term: getattr(device.terms, term) // 20})
    wrong = replace(planned, devices=(replace(device, terms=terms),))
    spec = with_checkpoint(resolve("tiny"))
    with pytest.raises(PlanMismatchError, match=f"bytes of {term}"):
        load_engine(wrong, spec, probe(), bundled_folder())


def test_a_plan_of_several_ranks_is_refused(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "llama")
    planned = replace(plan(folder, engine="native"), tensor_parallel=2)
    with pytest.raises(NotRunnableError, match="over 2 ranks, this version computes 1"):
        load_engine(planned, with_checkpoint(resolve(str(folder))), probe(), folder)
