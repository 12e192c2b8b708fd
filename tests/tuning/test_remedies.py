"""What is told to help would help, and what is missing is told where it is missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from oomproof.errors import NotRunnableError
from oomproof.hardware.describe import describe
from oomproof.models.resolve import resolve
from oomproof.planning.request import PlanRequest
from oomproof.tuning.options import AdapterSettings, TuningSettings
from oomproof.tuning.plan import TrainingPlan
from oomproof.tuning.planner import TrainingPlanner
from oomproof.tuning.rehearsal import made_up_data
from oomproof.tuning.remedies import describe_shortfall
from oomproof.units import GIB


def plan(
    gpus: str,
    *,
    model: str = "llama-3.1-8b",
    base_format: str = "nf4-dq",
    host_bytes: int | None = None,
    engine: str = "native",
    ranks: int = 1,
    longest: int = 2048,
    is_cut: bool = True,
    **options: Any,
) -> TrainingPlan:
    planner = TrainingPlanner(
        resolve(model),
        describe(gpus),
        PlanRequest(format=base_format, max_host_bytes=host_bytes),
        TuningSettings(adapter=AdapterSettings(), **options),
        engine=engine,
        ranks=ranks,
    )
    data = replace(made_up_data(longest), is_cut=is_cut)
    return planner.plan(data, context=longest, longest=longest)


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_more_sequences_at_once_than_fit_are_refused_with_as_many_as_do(engine: str) -> None:
    found = plan("12GiB", engine=engine, micro_batch=16)
    assert not found.fits
    assert found.shortfall_bytes == found.peak_bytes - found.usable_bytes > 0
    message, _ = describe_shortfall(found)
    assert message.startswith("16 sequences of 2,048 tokens at once need ")
    [fewer] = [one for one in found.remedies if one.startswith("--micro-batch ")]
    assert plan("12GiB", engine=engine, micro_batch=int(fewer.split()[1])).fits
    assert "--context 2048" not in found.remedies


def test_sequences_at_once_have_to_fit_as_they_are_shared_out() -> None:
    assert plan("13GiB", micro_batch=10, batch_size=16).micro_batch == 8


def test_what_the_host_lacks_is_said_of_the_host() -> None:
    found = plan("24GiB", longest=16_384, checkpointing="offload", host_bytes=3 * GIB)
    assert not found.fits
    assert found.lacks_host_memory
    needed = found.base.host.peak_bytes + found.host_bytes
    assert found.shortfall_bytes == needed - 3 * GIB > 0
    message, remedy = describe_shortfall(found)
    assert "host memory has 3.00 GiB" in message
    assert "--checkpointing auto" in remedy
    none = plan("24GiB", checkpointing="offload", host_bytes=GIB)
    assert none.remedies == ("more host memory",)


def test_another_format_is_a_remedy_only_where_it_would_fit() -> None:
    assert plan("8GiB", base_format="bf16").remedies == ("--format nf4-dq",)
    found = plan("8GiB", model="llama-3.1-70b", base_format="bf16")
    assert found.remedies == ("a smaller model, or a device with more memory",)


def test_sharing_layers_is_a_remedy_where_it_was_turned_off() -> None:
    found = plan("2x32GiB", model="llama-3.1-70b", ranks=2, shard="off")
    assert (found.fits, found.sharded) == (False, False)
    assert found.remedies == ("--shard on",)


def test_shorter_sequences_cut_samples_where_those_are_longer() -> None:
    def shorter(**options: Any) -> str:
        found = plan("8GiB", longest=8192, **options)
        return next(one for one in found.remedies if one.startswith("--context"))

    assert shorter(is_cut=True) == "--context 6016"
    assert shorter(is_cut=False) == "--context 6016 --long-samples truncate"
    assert shorter(is_cut=False, long_samples="drop") == "--context 6016"


def test_transformers_needs_a_gpu_to_keep_inputs_in_host_memory() -> None:
    with pytest.raises(NotRunnableError, match="use --checkpointing layers"):
        plan("cpu", model="tiny", engine="transformers", checkpointing="offload", longest=256)
