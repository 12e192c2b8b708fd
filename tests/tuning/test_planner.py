"""A training plan fits or says what would, for machines that are not here."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from oomproof.errors import InputError, NotRunnableError
from oomproof.hardware.describe import describe
from oomproof.memory.peft import (
    Tuned,
    adapter_tensors,
    optimizer_bytes,
    split_optimizer_bytes,
    training_terms,
)
from oomproof.memory.training import KEPT_IN_ORDER
from oomproof.memory.training_shape import Kept
from oomproof.models.resolve import resolve
from oomproof.planning.request import PlanRequest
from oomproof.tuning.options import AdapterSettings, TuningSettings
from oomproof.tuning.plan import TrainingData, TrainingPlan, length_histogram
from oomproof.tuning.planner import TrainingPlanner
from oomproof.tuning.remedies import describe_shortfall
from oomproof.tuning.step_memory import NativeMemory

DATA = TrainingData(
    name="data.jsonl",
    samples=1000,
    tokens=500_000,
    learned_tokens=300_000,
    longest=4096,
    longest_line=17,
    truncated=0,
    dropped=0,
    validation_samples=50,
    rows=250,
    filled=0.9,
    lengths=((256, 400), (1024, 500), (4096, 100)),
)
TUNED = Tuned(
    rank=16,
    target_modules=("all-linear",),
    optimizer="adamw",
    checkpointing="layers",
    compute_bytes=2,
    packed=True,
)


def plan(
    gpus: str, model: str = "llama-3.1-8b", longest: int = 4096, **options: Any
) -> TrainingPlan:
    settings = TuningSettings(adapter=AdapterSettings(), **options)
    planner = TrainingPlanner(
        resolve(model), describe(gpus), PlanRequest(format="nf4-dq"), settings
    )
    return planner.plan(DATA, context=longest, longest=longest)


def test_an_8b_trains_on_24_gib_and_the_terms_add_up() -> None:
    found = plan("24GiB", longest=2048)
    assert found.fits
    assert found.shortfall_bytes == 0
    assert found.trainable_parameters == 41_943_040  # as peft counts it for rank 16
    assert found.terms.adapters == found.terms.gradients == 4 * found.trainable_parameters
    assert found.peak_bytes <= found.usable_bytes
    assert found.micro_batch * found.micro_batches_per_step >= found.batch_size == 16


def test_more_memory_means_more_at_once_and_shorter_sequences_too() -> None:
    small, large = (plan(gpu, longest=2048, checkpointing="layers") for gpu in ("16GiB", "24GiB"))
    assert small.micro_batch < large.micro_batch
    sizes = [bucket.micro_batch for bucket in small.buckets]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(bucket.samples for bucket in small.buckets) == DATA.samples


def test_memory_is_saved_before_sequences_are() -> None:
    assert plan("141GiB", longest=512).checkpointing == "none"
    assert plan("24GiB", longest=2048).checkpointing in ("layers", "offload")


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    found = plan("8GiB", longest=8192, checkpointing="none")
    assert not found.fits
    assert found.shortfall_bytes == found.peak_bytes - found.usable_bytes > 0
    message, remedy = describe_shortfall(found)
    assert "one sequence of 8,192 tokens needs" in message
    assert remedy.startswith("use ")
    for one in found.remedies:
        if one.startswith("--context"):
            shorter = plan("8GiB", longest=int(one.split()[1]), checkpointing="none")
            assert shorter.fits


def test_a_model_too_large_for_the_device_does_not_fit_at_all() -> None:
    found = plan("8GiB", model="llama-3.1-70b")
    assert not found.fits
    assert found.remedies


def test_options_that_are_named_are_kept() -> None:
    found = plan(
        "80GiB", longest=2048, optimizer="adamw-8bit", checkpointing="layers", micro_batch=1
    )
    assert (found.optimizer, found.checkpointing, found.micro_batch) == ("adamw-8bit", "layers", 1)
    assert found.micro_batches_per_step == 16


def test_the_largest_of_several_devices_is_used_and_said() -> None:
    found = plan("1x12GiB,1x24GiB", longest=2048)
    assert found.device == "24.0 GiB GPU"
    assert any("one device of 2 is used" in reason for reason in found.reasons)


def test_a_small_data_set_makes_a_small_step() -> None:
    settings = TuningSettings(adapter=AdapterSettings(), epochs=2.0)
    planner = TrainingPlanner(
        resolve("tiny"), describe("cpu"), PlanRequest(format="nf4-dq"), settings
    )
    found = planner.plan(replace(DATA, rows=5), context=256, longest=256)
    assert (found.batch_size, found.steps) == (5, 2)
    assert found.compute_dtype == "float32"


def test_the_plan_is_json_and_names_the_time_where_the_card_is_known() -> None:
    found = plan("RTX 4090", longest=1024)
    plain = json.loads(found.to_json())
    assert plain["schema"] == 1
    assert plain["peak_bytes"] == found.peak_bytes
    assert plain["base"]["format"] == "nf4-dq"
    assert found.train_s is not None
    assert plan("24GiB", longest=1024).train_s is None


def test_terms_grow_with_what_they_are_made_of() -> None:
    spec = resolve("llama-3.1-8b")

    def total(micro: int = 1, length: int = 1024, **changed: Any) -> int:
        device, _ = training_terms(
            spec, replace(TUNED, **changed), micro_batch=micro, length=length
        )
        return sum(device.values())

    assert total(micro=2) > total()
    assert total(length=2048) > total()
    assert total(checkpointing="none") > total() > total(checkpointing="offload")
    assert total() > total(optimizer="adamw-8bit") > total(optimizer="paged-adamw-8bit")
    assert total(rank=64) > total()
    assert total(target_modules=("q_proj",)) < total()


@pytest.mark.parametrize("name", ["foo_proj", "lm_head", "embed_tokens"])
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_targets_that_no_layer_has_are_refused_before_anything_is_made(
    name: str, engine: str
) -> None:
    adapter = AdapterSettings(target_modules=("q_proj", name))
    settings = TuningSettings(adapter=adapter, epochs=2.0)
    with pytest.raises(InputError, match=f"'{name}' is no linear layer of the decoder"):
        TrainingPlanner(
            resolve("tiny"), describe("24GiB"), PlanRequest(), settings, engine=engine
        ).plan(DATA, context=256, longest=256)


def test_optimizer_states_are_counted_as_bitsandbytes_keeps_them() -> None:
    assert optimizer_bytes([1000, 8192], "adamw") == 8 * 9192
    assert optimizer_bytes([1000, 8192], "adamw-8bit") == 8 * 1000 + 2 * (8192 + 4 * 32)
    assert sum(adapter_tensors(resolve("tiny"), TUNED)) == 317_440


def test_the_histogram_has_every_sample_once() -> None:
    assert length_histogram([3, 64, 65, 200, 200], 200) == ((64, 2), (128, 1), (200, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"micro_batch": 17},
        {"epochs": 0},
        {"learning_rate": float("nan")},
        {"warmup": 2},
        {"optimizer": "sgd"},
        {"long_samples": "keep"},
        {"patience": 1, "validation": 0.0},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        TuningSettings(adapter=AdapterSettings(), **options)
    with pytest.raises(InputError):
        AdapterSettings(rank=0)
    with pytest.raises(InputError):
        AdapterSettings(target_modules=("all-linear", "q_proj"))


def native(
    gpus: str, model: str = "llama-3.1-8b", longest: int = 2048, **options: Any
) -> TrainingPlan:
    settings = TuningSettings(adapter=AdapterSettings(), **options)
    planner = TrainingPlanner(
        resolve(model), describe(gpus), PlanRequest(format="nf4-dq"), settings, engine="native"
    )
    return planner.plan(replace(DATA, documents=4), context=longest, longest=longest)


@pytest.mark.parametrize("gpus", ["12GiB", "16GiB", "24GiB", "48GiB"])
def test_our_engine_keeps_as_many_activations_as_the_memory_has_room_for(gpus: str) -> None:
    found = native(gpus, micro_batch=2)
    assert found.fits
    assert found.kept is not None
    assert found.peak_bytes <= found.usable_bytes
    more = next((name for name in KEPT_IN_ORDER if found.kept[name] < 32), None)
    if more is None:
        return
    memory = NativeMemory(resolve("llama-3.1-8b"), "nf4-dq", dropout=False, on_gpu=True)
    tuned = replace(TUNED, optimizer="adamw", checkpointing="auto", documents=4)

    def training_bytes(kept: dict[str, int]) -> int:
        device, _ = memory.terms(replace(tuned, kept=Kept(**kept)), 2, 2048)
        return sum(device.values())

    kept = dict(found.kept)
    terms = found.terms
    assert training_bytes(kept) + terms.allocator + terms.cuda_context + terms.margin == (
        found.peak_bytes
    )
    # One more layer would take what the allocator has to itself.
    next_one = training_bytes({**kept, more: kept[more] + 1}) - training_bytes(kept)
    assert found.peak_bytes + next_one > found.usable_bytes


def test_fewer_sequences_at_once_are_computed_where_that_is_faster() -> None:
    found, most = native("RTX 4090"), native("RTX 4090", micro_batch=16)
    assert most.kept == {"attention": 0, "mid": 0, "qkv": 0, "gate_up": 0}
    assert found.micro_batch < most.micro_batch
    [told] = [reason for reason in found.reasons if "at once and not 16" in reason]
    assert told.startswith(f"{found.micro_batch} at once")
    assert found.train_s is not None
    assert most.train_s is not None
    assert found.train_s < 0.95 * most.train_s
    # Nobody knows how fast a GPU of no particular make is: as many as fit.
    assert native("24GiB").micro_batch == 16


@pytest.mark.parametrize(
    ("checkpointing", "kept"),
    [
        ("layers", {"attention": 32, "mid": 0, "qkv": 0, "gate_up": 0}),
        ("none", dict.fromkeys(("attention", "mid", "qkv", "gate_up"), 32)),
    ],
)
def test_what_is_kept_can_be_asked_for(checkpointing: str, kept: dict[str, int]) -> None:
    found = native("80GiB", checkpointing=checkpointing, micro_batch=2)
    assert (found.checkpointing, found.kept) == (checkpointing, kept)
    assert json.loads(found.to_json())["kept"] == kept


def test_inputs_of_layers_go_to_the_host_where_more_fits_so() -> None:
    found = native("10GiB")
    assert found.fits
    assert found.checkpointing == "offload"
    assert found.host_bytes > 0


def test_a_405b_is_planned_in_a_second_and_says_what_is_missing() -> None:
    begin_s = time.process_time()
    found = native("141GiB", model="llama-3.1-405b")
    assert time.process_time() - begin_s < 1
    assert not found.fits
    assert found.shortfall_bytes == found.peak_bytes - found.usable_bytes
    assert native("288GiB", model="llama-3.1-405b").fits


def test_short_documents_take_more_of_attentions_backward_pass() -> None:
    spec = resolve("llama-3.1-8b")
    memory = NativeMemory(spec, "nf4-dq", dropout=False, on_gpu=True)

    def activations(documents: int) -> int:
        device, _ = memory.terms(replace(TUNED, documents=documents), 4, 2048)
        return device["activations"]

    assert activations(1) <= activations(20) < activations(500)


@pytest.mark.parametrize(
    ("optimizer", "device", "host"),
    [
        ("adamw", 8 * 300_000, 0),
        ("paged-adamw", 8 * 50_000, 8 * 250_000),
        ("adamw-8bit", 2 * 300_000 + 8 * (196 + 977), 0),
        ("paged-adamw-8bit", 2 * 50_000 + 8 * (196 + 977), 2 * 250_000),
    ],
)
def test_pages_hold_the_moments_of_large_matrices_and_no_scales(
    optimizer: str, device: int, host: int
) -> None:
    assert split_optimizer_bytes([50_000, 250_000], optimizer) == (device, host)


def test_paged_32_bit_states_of_large_matrices_are_not_on_the_device() -> None:
    found = {
        name: native("80GiB", optimizer=name).terms.optimizer
        for name in ("adamw", "paged-adamw", "paged-adamw-8bit")
    }
    trained = adapter_tensors(resolve("llama-3.1-8b"), TUNED)
    # Of rank 16 those of 4,096 rows or columns have fewer than 100,000 numbers.
    small, _ = split_optimizer_bytes(trained, "paged-adamw")
    assert small <= found["paged-adamw"] < 1.1 * small
    assert found["adamw"] > 2 * found["paged-adamw"]


def test_a_format_that_no_engine_trains_is_refused_before_any_data() -> None:
    settings = TuningSettings(adapter=AdapterSettings())
    with pytest.raises(NotRunnableError, match="use --format nf4-dq"):
        TrainingPlanner(resolve("tiny"), describe("cpu"), PlanRequest(format="int8"), settings)


def ranked(gpus: str, model: str, ranks: int = 2, **options: Any) -> TrainingPlan:
    settings = TuningSettings(adapter=AdapterSettings(), **options)
    request = PlanRequest(format="nf4-dq")
    planner = TrainingPlanner(
        resolve(model), describe(gpus), request, settings, engine="native", ranks=ranks
    )
    return planner.plan(replace(DATA, rows=250), context=2048, longest=2048)


def test_layers_are_shared_only_where_whole_ones_do_not_fit() -> None:
    small, large = ranked("2x24GiB", "llama-3.1-8b"), ranked("2x32GiB", "llama-3.1-70b")
    assert (small.fits, small.sharded, small.terms.gathered) == (True, False, 0)
    assert (large.fits, large.sharded) == (True, True)
    assert large.terms.gathered > 0
    assert any("a part of every frozen layer" in reason for reason in large.reasons)
    assert not ranked("2x32GiB", "llama-3.1-70b", shard="off").fits
    shared = ranked("2x24GiB", "llama-3.1-8b", shard="on")
    assert shared.terms.weights < 0.7 * small.terms.weights


def test_ranks_are_planned_for_the_smallest_of_their_devices() -> None:
    found = ranked("12GiB,24GiB,20GiB", "llama-3.1-8b")
    assert found.device == "20.0 GiB GPU"
    assert found.terms.comm > 0
    assert not any("one device of" in reason for reason in found.reasons)


def test_each_of_two_ranks_takes_half_of_a_step_and_of_the_time() -> None:
    alone, two = ranked("H100", "llama-3.1-8b", 1), ranked("2xH100", "llama-3.1-8b")
    assert two.steps == alone.steps
    assert two.micro_batch * two.micro_batches_per_step == two.batch_size // 2
    assert alone.train_s is not None
    assert two.train_s is not None
    assert 0.45 < two.train_s / alone.train_s < 0.6
    assert two.flops == pytest.approx(alone.flops, rel=0.2)
