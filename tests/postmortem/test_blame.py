"""Which bytes were to blame."""

from __future__ import annotations

import pytest

from oomproof.faults.classify import classify_text
from oomproof.postmortem.blame import Blame, Term, blame
from oomproof.postmortem.scan import Spot, Stage
from oomproof.units import GIB
from tests.postmortem.logs import card


def judged(
    tried: str,
    words: str,
    stage: Stage = Stage.UNKNOWN,
    spot: Spot = Spot.UNKNOWN,
    weights_bytes: int | None = None,
) -> Blame | None:
    fault = classify_text(f"CUDA out of memory. Tried to allocate {tried}. {words}")
    assert fault is not None
    return blame(fault.figures, stage, spot, weights_bytes)


def term(*arguments: object, **options: object) -> Term:
    found = judged(*arguments, **options)  # type: ignore[arg-type]
    assert found is not None
    return found.term


def test_one_tensor_larger_than_the_gpu_could_never_fit() -> None:
    words = card("12.00", "9.02", "1.90", "0.96", "0.45")
    found = judged("55.57 GiB", words)
    assert found is not None
    assert found.term is Term.ONE_TENSOR
    assert "55.6 GiB" in found.why
    assert "never fit" in found.why
    assert term("55.57 GiB", words, spot=Spot.KV_CACHE) is Term.KV_CACHE
    assert term("55.57 GiB", words, spot=Spot.LOGITS) is Term.WORKSPACE


def test_a_limit_is_blamed_where_the_gpu_had_room() -> None:
    words = (
        "GPU 0 has a total capacity of 8.00 GiB of which 4.03 GiB is free. 2.94 GiB allowed; Of "
        "the allocated memory 2.81 GiB is allocated by PyTorch, and 0.01 GiB is reserved by "
        "PyTorch but unallocated."
    )
    assert term("94.00 MiB", words) is Term.LIMIT


def test_other_processes_are_blamed_where_without_them_it_would_have_fitted() -> None:
    listed = card(
        "23.64", "0.30", "10.90", "10.20", "0.10", before="Process 7 has 12.00 GiB memory in use. "
    )
    found = judged("512.00 MiB", listed)
    assert found is not None
    assert found.term is Term.OTHER_PROCESSES
    assert "12.0 GiB" in found.why
    assert (
        term("512.00 MiB", card("23.64", "0.30", "10.90", "10.20", "0.10")) is Term.OTHER_PROCESSES
    )


def test_the_drivers_own_share_and_a_desktop_are_no_other_process() -> None:
    assert term("2.00 GiB", card("23.65", "0.66", "22.10", "21.50", "0.10")) is Term.OWN_TENSORS


def test_memory_beside_torch_is_blamed_on_what_has_pools_of_its_own() -> None:
    assert term("1.00 GiB", card("23.65", "0.20", "23.20", "15.00", "0.10")) is Term.OUTSIDE_TORCH
    old = (
        "(GPU 0; 23.65 GiB total capacity; 9.00 GiB already allocated; 0.50 GiB free; 9.20 GiB "
        "reserved in total by PyTorch)"
    )
    assert term("1.00 GiB", old) is Term.OUTSIDE_TORCH


def test_fragmentation_is_blamed_where_the_bytes_were_there() -> None:
    found = judged("3.00 GiB", card("23.65", "1.66", "21.50", "16.20", "4.84"))
    assert found is not None
    assert found.term is Term.FRAGMENTATION
    assert "4.84 GiB" in found.why
    few = card("23.65", "0.05", "23.30", "22.80", "0.05")
    assert term("3.00 GiB", few) is not Term.FRAGMENTATION


def test_a_large_tensor_is_named_by_what_it_was_for() -> None:
    words = card("23.65", "2.00", "21.40", "20.90", "0.10")
    assert term("8.00 GiB", words) is Term.ONE_TENSOR
    assert term("8.00 GiB", words, spot=Spot.KV_CACHE) is Term.KV_CACHE
    assert term("8.00 GiB", words, spot=Spot.ATTENTION) is Term.WORKSPACE


def test_weights_are_blamed_where_they_are_what_was_there() -> None:
    words = card("15.70", "0.08", "15.48", "15.21", "0.04")
    assert term("130.00 MiB", words, spot=Spot.KV_CACHE) is Term.KV_CACHE
    found = judged("130.00 MiB", words, spot=Spot.KV_CACHE, weights_bytes=15 * GIB)
    assert found is not None
    assert found.term is Term.WEIGHTS
    assert "only came last" in found.why
    assert term("130.00 MiB", words, spot=Spot.KV_CACHE, weights_bytes=GIB) is Term.KV_CACHE


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (Stage.LOADING, Term.WEIGHTS),
        (Stage.GENERATING, Term.WORKSPACE),
        (Stage.TRAINING, Term.TRAINING),
        (Stage.UNKNOWN, Term.OWN_TENSORS),
    ],
)
def test_else_the_stage_says_it(stage: Stage, expected: Term) -> None:
    assert term("130.00 MiB", card("15.70", "0.08", "15.48", "15.21", "0.04"), stage) is expected


def test_nothing_is_blamed_without_numbers_and_traceback() -> None:
    assert judged("1.00 GiB", "") is None
