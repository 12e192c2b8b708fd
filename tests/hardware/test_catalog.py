from __future__ import annotations

import pytest

from oomproof.errors import HardwareError
from oomproof.hardware import catalog_data
from oomproof.hardware.catalog import (
    Accelerator,
    accelerators,
    architecture_of,
    lookup,
    match,
    metal_budget_bytes,
)
from oomproof.units import GIB, MIB

EVERY = pytest.mark.parametrize("one", accelerators(), ids=lambda one: one.key)


def test_the_catalog_has_at_least_48_accelerators_with_unique_keys() -> None:
    keys = [one.key for one in accelerators()]
    assert len(keys) >= 48
    assert len(set(keys)) == len(keys)


def test_remarks_are_about_entries_that_exist() -> None:
    keys = {one.key for one in accelerators()}
    assert keys >= catalog_data.REPORTED_FREE
    assert keys >= catalog_data.UNIFIED
    assert catalog_data.FURTHER_SPELLINGS.keys() <= keys


@EVERY
def test_free_memory_is_below_the_driver_total_and_near_the_label(one: Accelerator) -> None:
    label_bytes = one.label_gb * GIB
    assert one.free_bytes <= one.total_bytes <= label_bytes * 1.08
    assert one.free_bytes >= 0.65 * label_bytes
    assert one.total_bytes % MIB == 0
    assert one.free_bytes % MIB == 0


@EVERY
def test_figures_lie_within_what_such_hardware_can_have(one: Accelerator) -> None:
    assert 100e9 <= one.bandwidth_bytes_per_s <= 10e12
    assert one.flops_per_s is None or 5e12 <= one.flops_per_s <= 3e15
    assert one.source
    assert one.unified_memory == (one.kind == "mps" or one.key == "GB10")


@EVERY
def test_compute_capability_belongs_to_the_architecture(one: Accelerator) -> None:
    if one.kind == "cuda":
        assert architecture_of(one.compute_capability) == one.architecture
    else:
        assert one.compute_capability is None
        assert architecture_of(None) == "unknown"


@EVERY
def test_each_key_names_its_own_accelerator_alone(one: Accelerator) -> None:
    assert lookup(one.key) is one
    assert lookup(one.key.lower().replace(" ", "-")) is one
    assert lookup(one.key.upper().replace(" ", "")) is one


@EVERY
def test_the_driver_name_and_its_memory_lead_back_to_the_entry(one: Accelerator) -> None:
    assert match(one.name, one.total_bytes) is one


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("4090 laptop", "RTX 4090 Laptop"),
        ("A100 80GB", "A100-80GB"),
        ("a100_80g", "A100-80GB"),
        ("nvidia a100 80 GiB", "A100-80GB"),
        ("A100 80GB PCIe", "A100-PCIe-80GB"),
        ("h100", "H100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("A10G", "A10G"),
        ("a10", "A10"),
        ("Tesla T4", "T4"),
        ("Tesla V100-PCIE-32GB", "V100-32GB"),
        ("6000 Ada", "RTX 6000 Ada"),
        ("pro 6000", "RTX PRO 6000"),
        ("3080 12GB", "RTX 3080 12GB"),
        ("DGX Spark", "GB10"),
        ("Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("Apple M2 Ultra 192GB", "M2 Ultra 192GB"),
    ],
)
def test_lookup_forgives_spelling(text: str, key: str) -> None:
    assert lookup(text).key == key


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("a100", "A100-40GB, A100-80GB"),
        ("V100", "V100-16GB, V100-32GB"),
        ("RTX 3080", "RTX 3080 10GB, RTX 3080 12GB"),
        ("rtx 6000", "RTX 6000 Ada, RTX PRO 6000"),
        ("M3 Max", "M3 Max 64GB, M3 Max 128GB"),
    ],
)
def test_an_ambiguous_name_is_refused_with_the_choices(text: str, choices: str) -> None:
    with pytest.raises(HardwareError) as raised:
        lookup(text)
    assert str(raised.value) == f"{text!r} names 2 different GPUs: write one of {choices}"


@pytest.mark.parametrize(("text", "near"), [("RTX 4095", "RTX 4090"), ("A100-60GB", "A100-80GB")])
def test_an_unknown_name_is_refused_with_the_nearest(text: str, near: str) -> None:
    with pytest.raises(HardwareError, match="did you mean") as raised:
        lookup(text)
    assert near in str(raised.value)


@pytest.mark.parametrize("text", ["", "banana", "GPU", "é" * 20])
def test_a_name_like_no_other_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(HardwareError, match='"RTX 4090"'):
        lookup(text)


def test_cards_that_share_a_name_are_told_apart_by_memory() -> None:
    ten = match("NVIDIA GeForce RTX 3080", 10240 * MIB)
    twelve = match("NVIDIA GeForce RTX 3080", 12288 * MIB)
    assert ten is not None
    assert twelve is not None
    assert (ten.key, twelve.key) == ("RTX 3080 10GB", "RTX 3080 12GB")


def test_a_card_with_other_memory_than_the_catalog_knows_is_no_match() -> None:
    assert match("NVIDIA GeForce RTX 3060", 8192 * MIB) is None
    assert match("NVIDIA GeForce RTX 9999", 8192 * MIB) is None
    assert match("NVIDIA GeForce RTX 3080", None) is None


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((3, 5), "unknown"),
        ((6, 1), "pascal"),
        ((7, 0), "volta"),
        ((7, 5), "turing"),
        ((8, 0), "ampere"),
        ((8, 6), "ampere"),
        ((8, 9), "ada"),
        ((9, 0), "hopper"),
        ((10, 0), "blackwell"),
        ((12, 1), "blackwell"),
        ((14, 0), "unknown"),
        (None, "unknown"),
    ],
)
def test_architecture_follows_compute_capability(
    capability: tuple[int, int] | None, architecture: str
) -> None:
    assert architecture_of(capability) == architecture


def test_a_mac_lends_its_gpu_three_quarters_of_the_memory_and_a_small_one_two_thirds() -> None:
    assert metal_budget_bytes(64 * GIB) == 48 * GIB
    assert metal_budget_bytes(36 * GIB) == 27 * GIB
    assert metal_budget_bytes(16 * GIB) == 10922 * MIB
