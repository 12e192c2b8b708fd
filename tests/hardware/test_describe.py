from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomproof.errors import HardwareError
from oomproof.hardware.catalog import accelerators, lookup
from oomproof.hardware.describe import MAX_COUNT, MAX_DEVICES, describe
from oomproof.hardware.spec import HostSpec
from oomproof.units import GIB, MIB

HOST = HostSpec(
    total_ram_bytes=64 * GIB, available_ram_bytes=60 * GIB, free_disk_bytes=None, cpu_count=8
)
CUDA_KEYS = [one.key for one in accelerators() if one.kind == "cuda"]


def free(text: str) -> list[float]:
    return [device.free_bytes / GIB for device in describe(text, host=HOST).devices]


def test_a_size_means_exactly_that_much_free_memory_on_a_gpu_of_no_make() -> None:
    machine = describe("2x24GiB,1x12GiB", host=HOST)
    assert free("2x24GiB,1x12GiB") == [24, 24, 12]
    first = machine.devices[0]
    assert (first.name, first.kind, first.total_bytes) == ("24.0 GiB GPU", "cuda", 24 * GIB)
    assert first.bandwidth_bytes_per_s is None
    assert first.flops_per_s is None
    assert first.compute_capability is None
    assert first.uuid is None
    assert [device.index for device in machine.devices] == [0, 1, 2]
    assert machine.source == "described"
    assert machine.host is HOST
    assert machine.links == ()


def test_a_name_means_what_cuda_shows_free_on_an_idle_card_and_not_its_label() -> None:
    machine = describe("4x RTX 4090", host=HOST)
    assert len(machine.devices) == 4
    assert {device.free_bytes for device in machine.devices} == {24070 * MIB}
    assert machine.devices[3].name == "NVIDIA GeForce RTX 4090"
    assert machine.devices[3].compute_capability == (8, 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", [24]),
        (" 0.5 GiB ", [0.5]),
        ("2×24GiB", [24, 24]),
        ("2 X 8 gib", [8, 8]),
        ("2*8GiB , 1GiB", [8, 8, 1]),
        ("1x24GB", [24e9 / GIB]),
        ("4090", [24070 / 1024]),
        ("8xA100-80GB", [81030 / 1024] * 8),
        ("1x H100-80GB, 2x 24GiB", [80990 / 1024, 24, 24]),
    ],
)
def test_descriptions_are_read(text: str, expected: list[float]) -> None:
    assert free(text) == expected


@given(
    st.lists(
        st.tuples(
            st.integers(1, 16),
            st.one_of(
                st.integers(1, 10**6).map(lambda mib: f"{mib}MiB"), st.sampled_from(CUDA_KEYS)
            ),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["x", "X", "×", "*", " x "]),
    st.sampled_from([",", ", ", " , "]),
)
def test_what_is_written_is_what_is_there(
    groups: list[tuple[int, str]], times: str, comma: str
) -> None:
    machine = describe(comma.join(f"{n}{times}{what}" for n, what in groups), host=HOST)
    expected = [
        int(what.removesuffix("MiB")) * MIB if what.endswith("MiB") else lookup(what).free_bytes
        for count, what in groups
        for _ in range(count)
    ]
    assert [device.free_bytes for device in machine.devices] == expected
    assert [device.index for device in machine.devices] == list(range(len(expected)))


@given(st.text(max_size=60))
def test_no_text_raises_anything_but_a_hardware_error(text: str) -> None:
    with contextlib.suppress(HardwareError):
        assert 1 <= len(describe(text, host=HOST).devices) <= MAX_DEVICES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a GPU is missing"),
        (",", "a GPU is missing"),
        ("4090,", "a GPU is missing"),
        ("2x", "a GPU is missing in '2x'"),
        ("0x4090", "asks for 0 GPUs: ask for 1 to 64"),
        (f"{MAX_COUNT + 1}x4090", "asks for 65 GPUs: ask for 1 to 64"),
        ("64x4090,64x4090,4090", "more than 128 GPUs"),
        ("-1x4090", "unknown GPU '-1x4090'"),
        ("2.5x4090", "unknown GPU '2.5x4090'"),
        ("2x2x4090", "unknown GPU '2x4090'"),
        ("24", 'neither a GPU nor a size: write "24GiB"'),
        ("0", 'neither a GPU nor a size: write "24GiB"'),
        ("2x24G", 'neither a GPU nor a size: write "24GiB"'),
        ("0GiB", "must be more than 0"),
        ("9999TiB", "at most 1 PiB"),
        ("a100", "write one of A100-40GB, A100-80GB"),
        ("4x RTX 4095", "did you mean RTX 4090"),
        ("cpu,4090", "mixes the processor with GPUs"),
        ("2x cpu", "mixes the processor with GPUs"),
        ("4090,MI300X", "mixes GPUs of kinds cuda and rocm"),
        ("2x M3 Max 128GB", "a Mac has 1"),
        ("4090;3090", "unknown GPU"),
        ("9" * 2000, "has 2000 characters, at most 1000"),
        ("9" * 400 + "GiB", "unknown GPU"),
    ],
)
def test_a_bad_description_is_refused_with_the_part_and_the_remedy(text: str, words: str) -> None:
    with pytest.raises(HardwareError) as raised:
        describe(text, host=HOST)
    assert words in str(raised.value)
    assert raised.value.remedy


def test_cpu_is_one_device_with_the_hosts_available_ram() -> None:
    machine = describe(" CPU ", host=HOST)
    (device,) = machine.devices
    assert (device.name, device.kind, device.index) == ("cpu", "cpu", 0)
    assert (device.total_bytes, device.free_bytes) == (64 * GIB, 60 * GIB)
    assert not machine.has_gpu


def test_without_a_host_this_machines_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oomproof.hardware.describe.probe_host", lambda: HOST)
    assert describe("24GiB").host is HOST
    assert describe("cpu").host is HOST


def test_a_gpu_with_unified_memory_brings_its_own_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oomproof.hardware.describe.probe_host", lambda: HOST)
    machine = describe("M3 Max 128GB")
    assert machine.devices[0].kind == "mps"
    assert machine.devices[0].free_bytes == 96 * GIB
    assert machine.host.total_ram_bytes == 128 * GIB
    assert machine.host.available_ram_bytes == 96 * GIB
    assert describe("GB10", host=HOST).host is HOST
