"""Checkpoints that are quantized already: read strictly, planned as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

from oomproof.errors import CheckpointError, ConfigError, InputError
from oomproof.formats import FORMATS, DType, is_known_format
from oomproof.hardware.describe import describe
from oomproof.models.quantization import READERS
from oomproof.models.quantized import CheckpointQuantization
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from tests.models.configs import small, spec_of

LLAMA = small("LlamaForCausalLM", "llama", torch_dtype="bfloat16")
NF4_DQ = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
BLOCK = {"quant_method": "fp8", "weight_block_size": [16, 32]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32}


def compressed(form: str, inputs: Mapping[str, object] | None = None, **weights: object) -> Any:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"weights": weights, "input_activations": inputs}},
        "ignore": ["lm_head"],
    }


W4A16 = compressed(
    "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True
)
W8A8 = compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)
FP8_STATIC = compressed(
    "float-quantized", {"dynamic": False}, num_bits=8, type="float", strategy="tensor"
)


def quantized(fields: Mapping[str, object]) -> ModelSpec:
    return spec_of({**LLAMA, "quantization_config": fields})


def quantization(fields: Mapping[str, object]) -> CheckpointQuantization:
    found = quantized(fields).checkpoint_quantization
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (NF4_DQ, "nf4-dq"),
        ({**NF4_DQ, "bnb_4bit_use_double_quant": False}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "llm-int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_8bit": True}, "llm-int8"),
        (FBGEMM, "fp8"),
        (BLOCK, "fp8-block"),
        (FP8_STATIC, "fp8"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
        (W8A8, "w8a8"),
        (W4A16, "w4a16-g32"),
        (GPTQ, "gptq-4bit-g32"),
        ({**GPTQ, "group_size": -1}, "gptq-4bit"),
        (AWQ, "awq-4bit-g32"),
    ],
)
def test_every_method_is_recognised_and_named(fields: dict[str, object], name: str) -> None:
    found = quantization(fields).format
    assert found is not None
    assert found.name == name
    assert is_known_format(name)
    assert found.is_quantized


def test_a_bitsandbytes_checkpoint_is_in_our_own_formats() -> None:
    assert quantization(NF4_DQ).format is FORMATS["nf4-dq"]


@pytest.mark.parametrize(
    ("fields", "shape", "expected_bytes"),
    [
        # rows, columns = 64, 96
        (FBGEMM, (64, 96), 64 * 96 + 4 * 64 + 4),
        (BLOCK, (64, 96), 64 * 96 + 4 * (4 * 3)),
        (BLOCK, (65, 97), 65 * 97 + 4 * (5 * 4)),
        (FP8_STATIC, (64, 96), 64 * 96 + 2 + 2),
        (W8A8, (64, 96), 64 * 96 + 2 * 64),
        (W4A16, (64, 96), 64 * 96 // 2 + 2 * 64 * 3 + 16),
        (GPTQ, (64, 96), 64 * 96 // 2 + 4 * 3 * 8 + 2 * 3 * 64 + 4 * 96),
        (AWQ, (64, 96), 64 * 96 // 2 + 4 * 3 * 8 + 2 * 3 * 64),
    ],
)
def test_a_layout_has_exact_bytes(
    fields: dict[str, object], shape: tuple[int, int], expected_bytes: int
) -> None:
    found = quantization(fields).format
    assert found is not None
    assert found.stored_bytes(*shape) == expected_bytes


def test_asymmetric_groups_have_zero_points() -> None:
    asymmetric = compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
    )
    with_zeros, without = quantization(asymmetric).format, quantization(W4A16).format
    assert with_zeros is not None
    assert without is not None
    assert with_zeros.stored_bytes(64, 96) - without.stored_bytes(64, 96) == 4 * 8 * 3


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "quantization_config.quant_method"),
        ({"quant_method": 5}, "quantization_config.quant_method"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit"),
        ({**NF4_DQ, "bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type"),
        ({**NF4_DQ, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage"),
        ({**NF4_DQ, "load_in_4bit": "yes"}, "load_in_4bit"),
        ({**NF4_DQ, "llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules"),
        ({**FBGEMM, "modules_to_not_convert": [5]}, "modules_to_not_convert"),
        ({**BLOCK, "weight_block_size": [128]}, "weight_block_size"),
        ({**BLOCK, "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "gptq", "group_size": 128}, "bits"),
        ({**GPTQ, "bits": 64}, "bits"),
        ({**GPTQ, "group_size": 10**9}, "group_size"),
        ({"quant_method": "awq", "bits": 4}, "group_size"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": {}}}, "a"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}}, "weights"),
        (compressed("int-quantized", num_bits=4, type="int"), "num_bits"),
        (compressed("pack-quantized", num_bits=4, strategy="group"), "group_size"),
    ],
)
def test_what_is_wrong_is_one_error_that_names_the_field(
    fields: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError, match=field) as refused:
        quantized(fields)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("config.json, field 'quantization_config")


def test_a_quantization_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not an object"):
        quantized([1])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["mxfp4", "hqq", "made-up"])
def test_another_method_is_recognised_and_refused_when_planned(method: str) -> None:
    spec = quantized({"quant_method": method})
    with pytest.raises(InputError, match=rf"already quantized \({method}\), which is not planned"):
        make_plan(spec, describe("24GiB"), PlanRequest())


@pytest.mark.parametrize(
    ("name", "module", "kept"),
    [
        ("lm_head", "lm_head", True),
        ("self_attn", "model.layers.3.self_attn.q_proj", True),
        ("model.layers.0.mlp", "model.layers.0.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        (r"re:.*self_attn\.[qk]_proj$", "model.layers.0.self_attn.k_proj", True),
        (r"re:.*self_attn\.[qk]_proj$", "model.layers.0.self_attn.v_proj", False),
        ("re:(", "model.layers.0.self_attn.v_proj", False),
    ],
)
def test_a_name_keeps_a_module_and_what_is_below_it(name: str, module: str, kept: bool) -> None:
    found = CheckpointQuantization(method="fp8", format=None, kept_modules=(name,))
    assert found.keeps(module) is kept


def test_modules_that_are_kept_stay_in_16_bits() -> None:
    spec = quantized({**FBGEMM, "modules_to_not_convert": ["self_attn", "lm_head"]})
    for tensor in spec.tensors:
        assert tensor.kept == (tensor.role is Role.LINEAR and "self_attn" in tensor.name)


# --- plans


def planned(spec: ModelSpec, gpus: str, **options: Any) -> Plan:
    return make_plan(spec, describe(gpus), PlanRequest(**options))


def weights_of(plan: Plan) -> int:
    return sum(device.terms.weights for device in plan.devices)


def test_metas_own_fp8_layout_and_a_uniform_one_differ_by_what_is_kept() -> None:
    meta = planned(resolve("llama-3.1-405b-fp8"), "8xH100-80GB")
    uniform = planned(resolve("llama-3.1-405b"), "8xH100-80GB", format="fp8")
    assert round(weights_of(meta) / 1e9) == 487
    assert round(weights_of(uniform) / 1e9) == 410
    assert meta.fits
    assert uniform.fits
    assert round(meta.download_bytes / 1e9) == 487


def test_fp8_below_its_capability_is_refused_and_never_doubled() -> None:
    plan = planned(resolve("llama-3.1-405b-fp8"), "8xA100-80GB")
    assert not plan.runnable
    assert any("needs compute capability 8.9" in reason for reason in plan.reasons)
    assert round(weights_of(plan) / 1e9) == 487


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_4_bit_checkpoint_takes_what_quantizing_its_source_takes(engine: str) -> None:
    config = resolve("llama-3.1-8b").config
    spec = spec_of({**config, "quantization_config": NF4_DQ})
    ours = planned(resolve("llama-3.1-8b"), "24GiB", format="nf4-dq", engine=engine)
    theirs = planned(spec, "24GiB", engine=engine)
    assert (theirs.format, theirs.engine, theirs.runnable) == ("nf4-dq", engine, True)
    assert planned(spec, "24GiB").engine == "native"
    assert theirs.devices[0].terms == ours.devices[0].terms
    assert theirs.download_bytes < 0.4 * ours.download_bytes


@pytest.mark.parametrize("name", ["llama-3.1-8b-awq", "llama-3.1-8b-gptq"])
def test_other_methods_are_planned_and_say_what_runs_them(name: str) -> None:
    plan = planned(resolve(name), "24GiB")
    assert plan.fits
    assert not plan.runnable
    assert any("vLLM" in reason for reason in plan.reasons)
    assert 5.4e9 < weights_of(plan) < 6.0e9
    assert plan.alternatives == ()


def test_another_format_than_the_checkpoints_own_is_refused() -> None:
    spec = resolve("llama-3.1-8b-awq")
    with pytest.raises(InputError, match=r"its format is awq-4bit-g128, not nf4: leave --format"):
        planned(spec, "24GiB", format="nf4")
    assert planned(spec, "24GiB", format="awq-4bit-g128") == planned(spec, "24GiB")


def test_such_a_plan_comes_back_from_its_json() -> None:
    for name in ("llama-3.1-8b-awq", "llama-3.1-405b-fp8"):
        plan = planned(resolve(name), "8xH100-80GB")
        assert Plan.from_json(plan.to_json()) == plan


# --- headers


_SAFETENSORS = {
    DType.BFLOAT16: "BF16",
    DType.FLOAT16: "F16",
    DType.FLOAT32: "F32",
    DType.FLOAT8_E4M3FN: "F8_E4M3",
    DType.INT32: "I32",
    DType.INT64: "I64",
    DType.INT8: "I8",
    DType.UINT8: "U8",
}
Parts = dict[str, tuple[DType, tuple[int, ...]]]


def parts_of(spec: ModelSpec) -> Parts:
    """What a checkpoint of this model holds, by the layouts."""
    own = spec.checkpoint_quantization
    assert own is not None
    assert own.format is not None
    found: Parts = {}
    for tensor in spec.tensors:
        if tensor.role is Role.LINEAR and not tensor.kept:
            module = tensor.name.removesuffix(".weight")
            for part in own.format.components(*tensor.shape):
                shape = tensor.shape if part.numel == prod(tensor.shape) else (part.numel,)
                found[f"{module}.{part.name}"] = (part.dtype, shape)
        else:
            found[tensor.name] = (DType.BFLOAT16, tensor.shape)
    return found


def folder_of(folder: Path, fields: Mapping[str, object], parts: Parts) -> Path:
    """A folder with these tensors, all zeros."""
    folder.mkdir()
    config = {**LLAMA, "quantization_config": fields}
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in parts.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        entry = {"dtype": _SAFETENSORS[dtype], "shape": shape, "data_offsets": [begin, end]}
        header[name] = entry
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


@pytest.mark.parametrize("fields", [FBGEMM, BLOCK, FP8_STATIC, W8A8, W4A16, GPTQ, AWQ])
def test_what_headers_say_is_what_the_config_says(
    fields: dict[str, object], tmp_path: Path
) -> None:
    spec = quantized(fields)
    read = resolve(str(folder_of(tmp_path / "model", fields, parts_of(spec))))
    assert {tensor.stored_as is not None for tensor in read.tensors} == {True, False}
    here, there = (planned(each, "24GiB").devices[0].terms for each in (spec, read))
    assert here.weights == there.weights


def test_headers_are_exact_where_the_config_is_not(tmp_path: Path) -> None:
    parts = parts_of(quantized(FBGEMM))
    for name in [name for name in parts if name.endswith("weight_scale")]:
        parts[name] = (DType.BFLOAT16, parts[name][1])
    read = resolve(str(folder_of(tmp_path / "model", FBGEMM, parts)))
    scales = {p.dtype for t in read.tensors for p in t.stored_as or () if p.name == "weight_scale"}
    assert scales == {DType.BFLOAT16}


def test_a_layer_that_the_files_keep_in_16_bits_is_planned_so(tmp_path: Path) -> None:
    spec = quantized(AWQ)
    kept = "model.layers.0.mlp.up_proj"
    shape = next(t.shape for t in spec.tensors if t.name == f"{kept}.weight")
    parts = {name: p for name, p in parts_of(spec).items() if not name.startswith(kept)}
    parts[f"{kept}.weight"] = (DType.BFLOAT16, shape)
    read = resolve(str(folder_of(tmp_path / "model", AWQ, parts)))
    assert [t.name for t in read.tensors if t.kept] == [f"{kept}.weight"]


@pytest.mark.parametrize(
    ("fields", "part"), [(GPTQ, "qzeros"), (BLOCK, "weight_scale_inv"), (W4A16, "weight_packed")]
)
def test_a_part_that_is_missing_is_named(
    fields: dict[str, object], part: str, tmp_path: Path
) -> None:
    parts = parts_of(quantized(fields))
    lost = f"model.layers.2.mlp.down_proj.{part}"
    del parts[lost]
    with pytest.raises(CheckpointError, match=rf"lack '{lost}'"):
        resolve(str(folder_of(tmp_path / "model", fields, parts)))


def test_a_part_of_another_size_is_refused(tmp_path: Path) -> None:
    parts = parts_of(quantized(GPTQ))
    name = "model.layers.0.self_attn.q_proj.qweight"
    dtype, shape = parts[name]
    parts[name] = (dtype, (shape[0] - 8,))
    with pytest.raises(CheckpointError, match=r"has 504 elements, gptq-4bit-g32 of \[64, 64\]"):
        resolve(str(folder_of(tmp_path / "model", GPTQ, parts)))


def test_every_method_of_the_registry_is_tested_here() -> None:
    tested = {
        str(fields["quant_method"])
        for fields in (NF4_DQ, FBGEMM, BLOCK, FP8_STATIC, W8A8, W4A16, GPTQ, AWQ)
    }
    assert tested == set(READERS)


def test_deepseek_v3_is_planned_in_the_fp8_that_it_is_published_in() -> None:
    spec = resolve("deepseek-v3")
    plan = planned(spec, "8xH200")
    assert plan.format == "fp8-block"
    assert plan.fits
    assert not plan.runnable
    assert any("latent attention" in reason for reason in plan.reasons)
    experts = sum(t.numel for t in spec.tensors if t.role is Role.EXPERTS)
    # A byte a weight and a scale for each 128 x 128, embedding and head in 16 bits.
    assert weights_of(plan) == pytest.approx(spec.num_parameters * 1.0027, rel=0.003)
    assert experts > 0.95 * spec.num_parameters
