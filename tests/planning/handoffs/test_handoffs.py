"""Plans for other engines: their formats' bytes, their commands, and what they cannot do."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.errors import HardwareError, InputError, NotRunnableError
from oomproof.hardware.describe import describe
from oomproof.models.resolve import resolve
from oomproof.models.spec import Role, TensorSpec
from oomproof.planning.handoffs import HANDOFFS, hand_off
from oomproof.planning.handoffs.handoff import HandOff, spread
from oomproof.planning.handoffs.llama_cpp import BLOCKS, MIXTURES, gguf_bytes, gguf_type
from oomproof.planning.handoffs.mlx import mlx_bytes
from oomproof.planning.request import PlanRequest
from oomproof.units import GIB
from tests.cli.invoke import invoke


def handed(name: str, target: str, gpus: str, format_name: str = "auto", **options: Any) -> HandOff:
    hardware = describe(gpus, several_machines=target == "mlx")
    return hand_off(
        target, resolve(name), hardware, PlanRequest(**options), format_name=format_name
    )


def option(found: HandOff, name: str) -> str:
    words = shlex.split(found.commands[-1])
    return words[words.index(name) + 1]


# --- all of them


@pytest.mark.parametrize(
    ("target", "gpus"), [("vllm", "4xH100"), ("llama.cpp", "4xH100"), ("mlx", "M2 Ultra 192GB")]
)
@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b", "mixtral-8x7b", "qwen2.5-7b"])
def test_what_fits_has_a_command_and_stays_within_every_device(
    name: str, target: str, gpus: str
) -> None:
    found = handed(name, target, gpus)
    assert found.fits
    assert found.commands
    assert found.shortfall_bytes == 0
    assert all(device.peak_bytes <= device.usable_bytes for device in found.devices)
    assert json.loads(json.dumps(found.as_dict()))["engine"] == target


@pytest.mark.parametrize(
    ("target", "gpus"), [("vllm", "8GiB"), ("llama.cpp", "8GiB"), ("mlx", "M4 Pro 24GB")]
)
def test_what_does_not_fit_has_none_and_says_what_is_missing(target: str, gpus: str) -> None:
    found = handed("llama-3.1-405b", target, gpus)
    assert not found.fits
    assert found.commands == ()
    assert found.format is None
    assert found.shortfall_bytes > 90 * GIB
    assert sum("does not fit" in reason for reason in found.reasons) >= 3


@pytest.mark.parametrize("target", list(HANDOFFS))
def test_a_context_beyond_the_model_is_refused(target: str) -> None:
    gpus = "M2 Ultra 192GB" if target == "mlx" else "80GiB"
    with pytest.raises(InputError, match="ask for at most 131,072"):
        handed("llama-3.1-8b", target, gpus, context=200_000)


def test_an_unknown_engine_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"use one of vllm, llama\.cpp, mlx"):
        handed("llama-3.1-8b", "ollama", "80GiB")


@pytest.mark.parametrize("target", list(HANDOFFS))
def test_a_format_that_the_engine_has_not_is_refused(target: str) -> None:
    gpus = "M2 Ultra 192GB" if target == "mlx" else "80GiB"
    with pytest.raises(InputError, match="Q9 is no"):
        handed("llama-3.1-8b", target, gpus, "Q9")


@pytest.mark.parametrize("target", list(HANDOFFS))
def test_a_longer_context_never_needs_less(target: str) -> None:
    gpus = "M2 Ultra 192GB" if target == "mlx" else "H100"
    short, long = (handed("llama-3.1-8b", target, gpus, context=n) for n in (2048, 65_536))
    assert short.format == long.format
    assert short.devices[0].kv_cache_bytes * 32 == long.devices[0].kv_cache_bytes


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 2**30), min_size=1, max_size=12),
    st.lists(st.integers(0, 2**32), min_size=1, max_size=5),
)
def test_layers_are_spread_in_order_within_every_device(
    needs: list[int], usable: list[int]
) -> None:
    found = spread(needs, lambda _first, _end: 2**20, usable)
    if found is None:
        return
    assert found[0][0] == 0
    assert found[-1][1] == len(needs)
    assert [end for _, end in found[:-1]] == [first for first, _ in found[1:]]
    for (first, end), budget in zip(found, usable, strict=False):
        assert first < end
        assert sum(needs[first:end]) + 2**20 <= budget


# --- llama.cpp


def test_block_bytes_are_ggmls() -> None:
    bits = {name: 8 * size / weights for name, (weights, size) in BLOCKS.items()}
    assert bits["Q8_0"] == 8.5
    assert bits["Q6_K"] == 6.5625
    assert bits["Q5_K"] == 5.5
    assert bits["Q4_K"] == bits["Q4_0"] == 4.5


@pytest.mark.parametrize(
    ("mixture", "published_gb"),
    # Sizes of the files that the hub lists for Meta-Llama-3.1-8B-Instruct.
    [("Q8_0", 8.54), ("Q6_K", 6.60), ("Q5_K_M", 5.73), ("Q4_K_M", 4.92), ("Q4_K_S", 4.69)],
)
def test_a_mixture_of_the_8b_is_as_large_as_its_published_file(
    mixture: str, published_gb: float
) -> None:
    spec = resolve("llama-3.1-8b")
    size = sum(gguf_bytes(tensor, spec, mixture) for tensor in spec.tensors)
    assert size / 1e9 == pytest.approx(published_gb, abs=0.012)


def test_rows_that_are_no_multiple_of_a_block_fall_back() -> None:
    spec = resolve("llama-3.1-8b")
    for columns, expected in ((4096, "Q4_K"), (96, "Q5_0"), (80, "F16")):
        tensor = TensorSpec(
            name="model.layers.9.mlp.up_proj.weight",
            shape=(64, columns),
            role=Role.LINEAR,
            layer=9,
        )
        assert gguf_type(tensor, spec, "Q4_K_M") == expected


def test_norms_and_routers_stay_in_32_bits() -> None:
    spec = resolve("mixtral-8x7b")
    kinds = {t.role: gguf_type(t, spec, "Q4_K_M") for t in spec.tensors if t.layer == 9}
    assert kinds[Role.NORM] == kinds[Role.ROUTER] == "F32"
    assert kinds[Role.EXPERTS] in ("Q4_K", "Q6_K")


@pytest.mark.parametrize("mixture", list(MIXTURES))
def test_every_mixture_can_be_asked_for(mixture: str) -> None:
    found = handed("llama-3.1-8b", "llama.cpp", "RTX 4090", mixture.lower())
    assert found.format == mixture
    assert f"-{mixture}.gguf" in found.commands[-1]


def test_layers_go_over_unequal_gpus_and_the_split_counts_them() -> None:
    found = handed("llama-3.1-70b", "llama.cpp", "2x24GiB,1x12GiB")
    assert found.fits
    split = [int(count) for count in option(found, "-ts").split(",")]
    assert sum(split) == 81
    assert split[0] > split[2]
    assert option(found, "-ngl") == "81"


def test_the_embedding_is_in_host_memory_unless_it_is_the_output_too() -> None:
    untied = handed("llama-3.1-8b", "llama.cpp", "RTX 4090", "BF16")
    assert untied.host_bytes == 2 * 128_256 * 4096
    spec = resolve("llama-3.1-8b")
    assert untied.devices[0].weights_bytes < 2 * spec.num_parameters - untied.host_bytes + 2**24
    tied = handed("llama-3.2-1b", "llama.cpp", "RTX 4090", "BF16")
    assert tied.devices[0].weights_bytes >= 2 * resolve("llama-3.2-1b").num_parameters


def test_an_8_bit_cache_is_asked_for_in_llama_cpps_words() -> None:
    whole = handed("llama-3.1-8b", "llama.cpp", "RTX 4090")
    small = handed("llama-3.1-8b", "llama.cpp", "RTX 4090", kv_format="fp8")
    assert option(small, "-ctk") == option(small, "-ctv") == "q8_0"
    ratio = small.devices[0].kv_cache_bytes / whole.devices[0].kv_cache_bytes
    assert ratio == pytest.approx(34 / 64)


def test_a_folder_is_converted_where_it_lies() -> None:
    found = handed("tiny", "llama.cpp", "8GiB", "Q8_0")
    assert "hf download" not in found.commands[0]
    assert found.commands[0].startswith("python convert_hf_to_gguf.py /")


# --- MLX


def test_405b_runs_on_two_mac_studios_through_mlx() -> None:
    found = handed("llama-3.1-405b", "mlx", "2x M2 Ultra 192GB", "int4")
    assert found.fits
    assert found.format == "4-bit g64"
    whole = sum(mlx_bytes(tensor, 4) for tensor in resolve("llama-3.1-405b").tensors)
    assert round(whole / 1e9) == 228
    assert "--q-bits 4 --q-group-size 64" in found.commands[0]
    assert found.commands[1].startswith("mlx.launch --hostfile hosts.json mlx_lm.server")
    assert not handed("llama-3.1-405b", "mlx", "M2 Ultra 192GB", "int4").fits


def test_each_mac_holds_the_embedding_and_its_share_of_the_layers() -> None:
    one, two = (handed("llama-3.1-8b", "mlx", f"{n}x M2 Ultra 192GB", "bf16") for n in (1, 2))
    shared = 2 * 128_256 * 4096 * 2
    assert two.devices[0].weights_bytes == pytest.approx(
        shared + (one.devices[0].weights_bytes - shared) / 2, rel=1e-4
    )


def test_macs_that_cannot_share_a_model_are_refused() -> None:
    with pytest.raises(InputError, match=r"8 key-value heads .* 3 Macs"):
        handed("llama-3.1-8b", "mlx", "3x M2 Ultra 192GB")
    with pytest.raises(InputError, match="does not share a gemma2 model"):
        handed("gemma-2-9b", "mlx", "2x M2 Ultra 192GB")


def test_several_macs_are_no_machine_for_any_other_plan() -> None:
    with pytest.raises(HardwareError, match="a Mac has 1"):
        describe("2x M2 Ultra 192GB")


def test_mlx_needs_a_mac() -> None:
    with pytest.raises(InputError, match="MLX has no device"):
        handed("llama-3.1-8b", "mlx", "RTX 4090")


# --- vLLM


def test_nf4_is_answered_with_what_vllm_has_instead() -> None:
    found = handed("llama-3.1-8b", "vllm", "RTX 4090", "nf4-dq")
    assert found.format == "fp8"
    assert option(found, "--quantization") == "fp8"
    assert any("no format of vLLM" in reason for reason in found.reasons)
    small = handed("llama-3.1-8b", "vllm", "10GiB", "nf4-dq")
    assert small.format == "w4a16-g128 (a quantized repository)"
    old = handed("llama-3.1-8b", "vllm", "RTX 3090", "nf4")
    assert old.format == "w4a16-g128 (a quantized repository)"


def test_fp8_on_a_gpu_without_it_is_refused_not_doubled() -> None:
    with pytest.raises(NotRunnableError, match=r"8\.9, .* has 8\.0: it would become 16 bits"):
        handed("llama-3.1-8b", "vllm", "A100-80GB", "fp8")
    with pytest.raises(NotRunnableError, match=r"compute capability 8\.9"):
        handed("llama-3.1-405b-fp8", "vllm", "8xA100-80GB")


def test_405b_in_fp8_on_eight_h100_is_uniform_or_metas_own_layout() -> None:
    uniform = handed("llama-3.1-405b", "vllm", "8xH100-80GB")
    assert uniform.format == "fp8"
    assert option(uniform, "--quantization") == "fp8"
    assert option(uniform, "--tensor-parallel-size") == "8"
    assert round(sum(device.weights_bytes for device in uniform.devices) / 1e9) == 410
    own = handed("llama-3.1-405b-fp8", "vllm", "8xH100-80GB")
    assert own.fits
    assert "meta-llama/Llama-3.1-405B-Instruct-FP8" in own.commands[0]
    assert "--quantization" not in own.commands[0]
    assert round(sum(device.weights_bytes for device in own.devices) / 1e9) == 487


def test_quantizing_while_loading_needs_room_for_one_layer_in_16_bits() -> None:
    assert not handed("llama-3.1-8b", "vllm", "RTX 4080", "bf16").fits
    found = handed("llama-3.1-8b", "vllm", "RTX 4080", "fp8")
    assert found.format == "fp8"
    layer = 2 * (4096 * 4096 * 2 + 2 * 1024 * 4096 + 3 * 14_336 * 4096)
    peak = found.devices[0].weights_bytes + layer + found.devices[0].overhead_bytes
    assert peak < found.devices[0].usable_bytes


def test_quantized_checkpoints_are_served_as_they_are() -> None:
    for name in ("llama-3.1-8b-awq", "llama-3.1-8b-gptq"):
        found = handed(name, "vllm", "12GiB")
        assert found.fits
        assert resolve(name).source.path in found.commands[0]


def test_shares_are_equal_and_heads_divide_by_them() -> None:
    found = handed("llama-3.1-70b", "vllm", "4xA100-80GB")
    assert len({device.peak_bytes for device in found.devices}) == 1
    unequal = handed("llama-3.1-8b", "vllm", "2x24GiB,1x12GiB")
    assert all(device.name.startswith("24") for device in unequal.devices)
    assert any("2 of the 3 GPUs" in reason for reason in unequal.reasons)
    # 14 query heads: two shares, not four.
    assert len(handed("qwen2.5-0.5b", "vllm", "4x1.9GiB").devices) in (0, 1, 2)


def test_limits_become_vllms_share_of_the_memory() -> None:
    found = handed("llama-3.1-8b", "vllm", "H100", cap_bytes=40 * GIB, concurrency=4)
    assert 0.4 < float(option(found, "--gpu-memory-utilization")) <= 0.5
    assert option(found, "--max-num-seqs") == "4"
    assert option(found, "--max-model-len") == "8192"


# --- the command line


def test_the_commands_alone_go_to_stdout() -> None:
    done = invoke("plan", "llama-3.1-8b", "--for", "llama.cpp", "--gpus", "8GiB")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].startswith("hf download")
    assert lines[-1].startswith("llama-server")
    assert "fits" in done.err
    plain = json.loads(
        invoke("plan", "llama-3.1-8b", "--for", "vllm", "--gpus", "H100", "--json").out
    )
    assert plain["devices"][0]["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("llama-3.1-405b", "--for", "vllm", "--gpus", "8GiB"), 3),
        (("llama-3.1-8b", "--for", "vllm", "--gpus", "A100-80GB", "--format", "fp8"), 1),
        (("llama-3.1-8b", "--for", "ollama", "--gpus", "A100-80GB"), 1),
    ],
)
def test_exit_codes_are_those_of_plan(arguments: tuple[str, ...], code: int) -> None:
    done = invoke("plan", *arguments)
    assert done.code == code
    assert done.out == ""
    if code == 1:
        assert done.error
