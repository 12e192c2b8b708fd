"""transformers behind the engine interface: its own tokens, whatever the chunks and the company."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import oomproof.compat.engine as engine_module
from oomproof.compat.engine import TransformersEngine
from oomproof.compat.measure import MemoryMeter
from oomproof.compat.model import load_model
from oomproof.engine.messages import Event, FinishedEvent, Request, SamplingOptions, TokenEvent
from oomproof.engine.sampling import Draw, RequestSampler
from oomproof.errors import RequestError
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import Hardware
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import Plan
from oomproof.session import load, plan
from tests.compat.checkpoints import FAMILIES, random_checkpoint

GREEDY = SamplingOptions(temperature=0)
LENGTHS = (1, 5, 23, 90)


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return probe()


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return resolve("tiny")


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan("tiny", engine="transformers", format="bf16", context=256, concurrency=3)


@pytest.fixture(scope="module")
def tiny(planned: Plan, spec: ModelSpec) -> Any:
    return load_model(planned, spec, bundled_folder())


@pytest.fixture(scope="module")
def exact(planned: Plan, spec: ModelSpec) -> Any:
    """The bundled model in float32, where the order of additions cannot change a token."""
    return load_model(planned, spec, bundled_folder()).float()


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the engine keep its cache in float32 too."""
    monkeypatch.setattr(engine_module, "KV_FORMATS", {"bf16": "float32"})


@pytest.fixture
def drawn_from(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits that tokens were drawn from, in their order."""
    logits_seen: list[torch.Tensor] = []

    class Recorder(RequestSampler):
        def draw(self, logits: torch.Tensor) -> Draw:
            logits_seen.append(logits.clone())
            return super().draw(logits)

    monkeypatch.setattr(engine_module, "RequestSampler", Recorder)
    return logits_seen


@pytest.fixture(scope="module")
def shared(tiny: Any, planned: Plan, spec: ModelSpec, hardware: Hardware) -> TransformersEngine:
    return TransformersEngine(tiny, planned, spec, MemoryMeter(planned, hardware))


@pytest.fixture
def engine(shared: TransformersEngine) -> Iterator[TransformersEngine]:
    assert shared.idle
    yield shared
    while not shared.idle:
        shared.step()  # type: ignore[unreachable]


def prompt_of(length: int, seed: int = 0, vocab_size: int = 2048) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, vocab_size, (length,), generator=generator).tolist())


def request_of(prompt: Sequence[int], count: int, name: str = "a", **fields: Any) -> Request:
    values: dict[str, Any] = {"sampling": GREEDY, **fields}
    return Request(id=name, prompt_tokens=tuple(prompt), max_new_tokens=count, **values)


def finish(engine: TransformersEngine) -> list[Event]:
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    return events


def tokens_of(events: Sequence[Event], name: str = "a") -> list[int]:
    return [e.token for e in events if isinstance(e, TokenEvent) and e.request_id == name]


def answer(engine: TransformersEngine, prompt: Sequence[int], count: int) -> list[int]:
    engine.submit(request_of(prompt, count))
    return tokens_of(finish(engine))


def generate(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' own greedy answer, over its own cache that grows."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=-1, pad_token_id=3
    )
    out = model.generate(torch.tensor([prompt]), generation_config=config)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    assert len(tokens) == count
    return tokens


@torch.inference_mode()
def logits_without_cache(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocab] of all positions at once."""
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def assert_the_same_choices(model: Any, prompt: Sequence[int], count: int, ours: list[int]) -> None:
    """Equal greedy tokens, up to a first choice between logits that bfloat16 cannot tell apart."""
    theirs = generate(model, prompt, count)
    assert len(ours) == count
    if ours != theirs:
        at = next(i for i in range(count) if ours[i] != theirs[i])
        logits = logits_without_cache(model, (*prompt, *theirs[:at]))[-1].float()
        gap = (logits[theirs[at]] - logits[ours[at]]).abs()
        assert gap <= 4 * 2**-8 * logits.abs().max(), f"token {at}: {theirs[at]} by {gap:.3}"


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_equal_those_of_transformers(
    engine: TransformersEngine, tiny: Any, length: int
) -> None:
    prompt = prompt_of(length)
    assert_the_same_choices(tiny, prompt, 60, answer(engine, prompt, 60))


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("length", LENGTHS)
def test_in_float32_greedy_tokens_are_exactly_those_of_transformers(
    exact: Any, planned: Plan, spec: ModelSpec, hardware: Hardware, length: int
) -> None:
    engine = TransformersEngine(exact, planned, spec, MemoryMeter(planned, hardware))
    prompt = prompt_of(length, seed=1)
    assert answer(engine, prompt, 60) == generate(exact, prompt, 60)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("chunk", [1, 7, 64, 129, 130, 131])
def test_a_prompt_in_chunks_gives_the_logits_of_the_prompt_in_one_piece(
    chunk: int,
    exact: Any,
    planned: Plan,
    spec: ModelSpec,
    hardware: Hardware,
    drawn_from: list[torch.Tensor],
) -> None:
    in_chunks = replace(planned, prefill_chunk_tokens=chunk)
    engine = TransformersEngine(exact, in_chunks, spec, MemoryMeter(planned, hardware))
    prompt = prompt_of(130, seed=2)
    engine.submit(request_of(prompt, 8))
    silent = 0
    while not tokens_of(events := list(engine.step())):
        silent += 1
    assert silent == -(-130 // chunk) - 1
    tokens = tokens_of(events) + tokens_of(finish(engine))
    expected = logits_without_cache(exact, (*prompt, *tokens))[len(prompt) - 1 : -1]
    assert torch.allclose(torch.stack(drawn_from), expected, atol=1e-3, rtol=1e-3)
    assert tokens == expected.argmax(dim=-1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_answers_as_transformers_does_beyond_its_window_and_in_chunks(
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hardware: Hardware,
    drawn_from: list[torch.Tensor],
) -> None:
    folder = random_checkpoint(tmp_path, family)
    made = plan(folder, engine="transformers", format="bf16", context=256)
    shapes = resolve(str(folder))
    model = load_model(made, shapes, folder)
    prompt = prompt_of(75)
    meter = MemoryMeter(made, hardware)
    ours = answer(TransformersEngine(model, made, shapes, meter), prompt, 20)
    assert_the_same_choices(model, prompt, 20, ours)

    monkeypatch.setattr(engine_module, "KV_FORMATS", {"bf16": "float32"})
    expected = generate(model.float(), prompt, 20)
    logits = logits_without_cache(model, (*prompt, *expected))[len(prompt) - 1 : -1]
    assert logits.std() > 0.01
    for chunk in (256, 20):
        drawn_from.clear()
        chunked = replace(made, prefill_chunk_tokens=chunk)
        assert answer(TransformersEngine(model, chunked, shapes, meter), prompt, 20) == expected
        assert torch.allclose(torch.stack(drawn_from), logits, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("in_float32")
def test_log_probabilities_are_those_of_the_models_own_logits(
    exact: Any, planned: Plan, spec: ModelSpec, hardware: Hardware
) -> None:
    engine = TransformersEngine(exact, planned, spec, MemoryMeter(planned, hardware))
    prompt, sampling = prompt_of(20), SamplingOptions(temperature=5, top_k=9, seed=1, logprobs=3)
    engine.submit(request_of(prompt, 6, sampling=sampling))
    drawn = [event for event in finish(engine) if isinstance(event, TokenEvent)]
    tokens = [event.token for event in drawn]
    logits = logits_without_cache(exact, (*prompt, *tokens))[len(prompt) - 1 : -1]
    for event, expected in zip(drawn, logits.log_softmax(dim=-1), strict=True):
        assert event.logprob == pytest.approx(expected[event.token].item(), abs=1e-3)
        values, best = expected.topk(3)
        assert [token for token, _ in event.top_logprobs] == best.tolist()
        told = [logprob for _, logprob in event.top_logprobs]
        assert told == pytest.approx(values.tolist(), abs=1e-3)


def test_a_penalty_keeps_tokens_from_coming_again(engine: TransformersEngine) -> None:
    prompt = prompt_of(20)
    sampling = SamplingOptions(temperature=0, repetition_penalty=100)
    engine.submit(request_of(prompt, 30, sampling=sampling))
    tokens = tokens_of(finish(engine))
    assert len(set(tokens)) == len(tokens) == 30
    assert not set(tokens) & set(prompt)


def test_more_requests_than_slots_answer_as_each_alone(engine: TransformersEngine) -> None:
    prompts = {str(n): prompt_of(n, seed=n) for n in (3, 40, 11, 1, 70)}
    alone = {name: answer(engine, prompt, 12) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        engine.submit(request_of(prompt, 12, name))
    first = engine.step()
    assert {event.request_id for event in first} == {"3", "40", "11"}
    events = [*first, *finish(engine)]
    assert {name: tokens_of(events, name) for name in prompts} == alone


def test_a_request_that_comes_while_others_are_answered_changes_none_of_them(
    engine: TransformersEngine,
) -> None:
    prompts = {str(n): prompt_of(n, seed=n) for n in (9, 30)}
    alone = {name: answer(engine, prompt, 10) for name, prompt in prompts.items()}
    engine.submit(request_of(prompts["9"], 10, "9"))
    events = [event for _ in range(4) for event in engine.step()]
    engine.submit(request_of(prompts["30"], 10, "30"))
    events += finish(engine)
    assert {name: tokens_of(events, name) for name in prompts} == alone


def test_a_slot_that_held_a_long_request_keeps_nothing_of_it(engine: TransformersEngine) -> None:
    short = prompt_of(6, seed=8)
    fresh = answer(engine, short, 10)
    for name in "xyz":
        engine.submit(request_of(prompt_of(240, seed=ord(name)), 16, name))
    finish(engine)
    assert answer(engine, short, 10) == fresh


def test_a_seed_repeats_an_answer_in_any_company(engine: TransformersEngine) -> None:
    prompt, sampling = prompt_of(12), SamplingOptions(seed=7, top_p=0.9)
    engine.submit(request_of(prompt, 20, sampling=sampling))
    alone = tokens_of(finish(engine))
    engine.submit(request_of(prompt_of(50), 20, "b", sampling=SamplingOptions(seed=8)))
    engine.submit(request_of(prompt, 20, sampling=sampling))
    assert tokens_of(finish(engine)) == alone


def test_prompt_and_answer_may_fill_the_context_to_its_last_token(
    engine: TransformersEngine,
) -> None:
    assert len(answer(engine, prompt_of(250), 6)) == 6
    assert len(answer(engine, prompt_of(1), 255)) == 255


@pytest.mark.parametrize(
    ("prompt", "count", "said"),
    [
        (250, 7, r"250 tokens and an answer of up to 7 .* 256: ask for at most 6 new tokens"),
        (256, 1, r"shorten the prompt to fewer than 256 tokens, or plan with --context 257"),
        (1000, 20, r"1,000 tokens .*shorten the prompt .*--context 1020"),
    ],
)
def test_what_can_never_fit_is_refused_with_every_number(
    engine: TransformersEngine, prompt: int, count: int, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        engine.submit(request_of([5] * prompt, count))
    assert engine.idle


@pytest.mark.parametrize("token", [-1, 2048, 10**12])
def test_a_token_outside_the_vocabulary_is_refused(engine: TransformersEngine, token: int) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary of 2,048"):
        engine.submit(request_of((5, token), 1))
    assert engine.idle


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(engine: TransformersEngine) -> None:
    prompt = prompt_of(8)
    tokens = answer(engine, prompt, 20)
    stop = tokens[9]
    engine.submit(request_of(prompt, 20, stop_tokens=frozenset({stop})))
    events = finish(engine)
    kept = tokens[: tokens.index(stop)]
    assert tokens_of(events) == kept
    assert events[-1] == FinishedEvent(
        request_id="a", reason="stop", prompt_tokens=8, new_tokens=len(kept)
    )


def test_cancelled_requests_end_and_free_their_slots(engine: TransformersEngine) -> None:
    prompt = prompt_of(10)
    fresh = answer(engine, prompt, 8)
    for name in ("a", "b", "c", "waiting"):
        engine.submit(request_of(prompt, 200, name))
    engine.step()
    engine.step()
    for name in ("a", "waiting", "nobody"):
        engine.cancel(name)
    ended = {e.request_id: e for e in engine.step() if isinstance(e, FinishedEvent)}
    assert {name: (e.reason, e.new_tokens) for name, e in ended.items()} == {
        "a": ("cancelled", 2),
        "waiting": ("cancelled", 0),
    }
    assert not engine.idle
    engine.cancel("b")
    engine.cancel("c")
    engine.step()
    assert engine.idle
    assert answer(engine, prompt, 8) == fresh  # type: ignore[unreachable]


def test_an_idle_engine_steps_without_events(engine: TransformersEngine) -> None:
    assert list(engine.step()) == []


def test_every_cache_is_carved_from_one_pool_of_the_planned_bytes(
    tiny: Any, planned: Plan, spec: ModelSpec
) -> None:
    pools, caches = engine_module.allocate_caches(tiny, planned, spec)
    [pool] = pools
    assert len(caches) == planned.concurrency
    views = [
        tensor
        for cache in caches
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    ]
    assert sum(view.nbytes for view in views) == pool.nbytes
    assert {view.untyped_storage().data_ptr() for view in views} == {pool.data_ptr()}
    assert len({view.data_ptr() for view in views}) == len(views)
    planned_bytes = planned.devices[0].terms.kv_cache
    assert pool.nbytes <= planned_bytes <= pool.nbytes + 4096


def test_nothing_is_allocated_for_a_cache_after_loading(engine: TransformersEngine) -> None:
    before = [
        (layer.keys.data_ptr(), layer.values.data_ptr())
        for cache in engine._free_caches
        for layer in cache.layers
    ]
    answer(engine, prompt_of(200), 20)
    after = [
        (layer.keys.data_ptr(), layer.values.data_ptr())
        for cache in engine._free_caches
        for layer in cache.layers
    ]
    assert sorted(before) == sorted(after)


def test_a_closed_model_gives_its_weights_and_caches_back() -> None:
    model = load("tiny", engine="transformers", format="bf16", context=64)
    guarded: Any = model._engine
    engine = guarded.inner.engine
    alive = [
        weakref.ref(engine.model.lm_head.weight),
        weakref.ref(engine._free_caches[0].layers[0].keys),
    ]
    model.generate("hello", max_new_tokens=2)
    model.close()
    assert [reference() is None for reference in alive] == [True, True]
    assert model.measured_terms()[0].weights > 0


@pytest.mark.parametrize(("weights", "kv"), [("bf16", "fp16"), ("fp16", "bf16"), ("nf4", "fp16")])
def test_a_kv_format_other_than_the_compute_dtype_runs_or_is_planned_as_not_runnable(
    weights: str, kv: str
) -> None:
    made = plan("tiny", engine="transformers", format=weights, kv_format=kv)
    if made.runnable:
        with load(made) as model:
            assert model.generate("hello", max_new_tokens=2, seed=0)


@pytest.mark.parametrize("weight_format", ["nf4", "nf4-dq", "llm-int8"])
@pytest.mark.parametrize(
    "shape", [{"intermediate_size": 96}, {"intermediate_size": 80}, {"hidden_size": 72}], ids=str
)
def test_widths_that_are_no_multiple_of_64_run_or_are_planned_as_not_runnable(
    weight_format: str, shape: dict[str, int], tmp_path: Path
) -> None:
    folder = random_checkpoint(tmp_path, **shape)  # type: ignore[arg-type]
    made = plan(folder, engine="transformers", format=weight_format)
    if made.runnable:
        with load(made) as model:
            stream = model.stream("hello", max_new_tokens=2, temperature=0)
            list(stream)
            assert stream.finish_reason is not None
