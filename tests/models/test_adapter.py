"""An adapter's folder is read strictly: whatever cannot be honoured exactly is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from oomproof.errors import CheckpointError, ConfigError, ModelNotFoundError
from oomproof.models.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter, with_adapter
from oomproof.models.resolve import resolve
from tests.models.adapters import ALL, ATTENTION, Tensors, plain_config, write_adapter

TINY = resolve("tiny")
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_every_pair_names_its_weight_its_rank_and_its_scale(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "my-adapter", TINY, ALL, rank=12, dtype=torch.bfloat16)
    adapter = read_adapter(folder, TINY)
    linears = [t for t in TINY.tensors if t.name.endswith("_proj.weight")]
    assert [one.weight for one in adapter.weights] == [t.name for t in linears]
    assert {one.rank for one in adapter.weights} == {12}
    assert {one.scale for one in adapter.weights} == {2.0}
    first, tensor = adapter.weights[0], linears[0]
    assert first.shape == tensor.shape
    assert first.a.shape == (12, tensor.shape[1])
    assert first.b.shape == (tensor.shape[0], 12)
    assert first.a.dtype == "bfloat16"
    assert first.b.offset_bytes > 8
    assert adapter.name == "my-adapter"
    assert adapter.rank == 12
    assert adapter.num_parameters == sum(12 * sum(t.shape) for t in linears)
    assert adapter.path == str(folder)
    assert adapter.warning is None
    assert with_adapter(TINY, folder).fingerprint == TINY.fingerprint


def test_the_fingerprint_follows_what_a_plan_depends_on(tmp_path: Path) -> None:
    one, same, other = (
        read_adapter(write_adapter(tmp_path / name, TINY, rank=rank), TINY).fingerprint
        for name, rank in (("one", 8), ("same", 8), ("other", 16))
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("config", "module", "rank", "scale"),
    [
        ({}, "q_proj", 8, 2),
        ({"use_rslora": True}, "q_proj", 8, 16 / sqrt(8)),
        ({"rank_pattern": {"q_proj": 4}}, "q_proj", 4, 4),
        ({"rank_pattern": {"q_proj": 4}}, "v_proj", 8, 2),
        ({"rank_pattern": {r"layers\.0\..*": 4, "q_proj": 2}}, "q_proj", 4, 4),
        ({"alpha_pattern": {"(q|k)_proj": 3}}, "q_proj", 8, 3 / 8),
        ({"alpha_pattern": {r"model\.layers\.\d+\.self_attn\.q_proj": 4.5}}, "q_proj", 8, 4.5 / 8),
        (
            {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True},
            "q_proj",
            4,
            0.5,
        ),
    ],
)
def test_ranks_and_scales_are_pefts(
    config: dict[str, Any], module: str, rank: int, scale: float, tmp_path: Path
) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "adapter", TINY, config=config), TINY)
    found = next(
        one for one in adapter.weights if one.module.endswith(f"layers.0.self_attn.{module}")
    )
    assert found.rank == rank
    assert found.scale == pytest.approx(scale)


def test_patterns_mean_what_they_mean_to_peft() -> None:
    from peft.utils.other import get_pattern_key

    keys = ("q_proj", "layers.1.self_attn.v_proj", r"layers\.\d+\.mlp\..*", "(k|o)_proj")
    config = plain_config(alpha_pattern={key: float(n) for n, key in enumerate(keys)})
    for tensor in TINY.tensors:
        module = tensor.name.removesuffix(".weight")
        key = get_pattern_key(keys, module)
        expected = float(keys.index(key)) if key in keys else 16.0
        assert config.scale_of(module) == expected / 8


@pytest.mark.parametrize(
    ("config", "layers"),
    [({"layers_to_transform": [0, 2]}, {0, 2}), ({"target_modules": r".*(q|v)_proj"}, None)],
)
def test_layers_and_regular_expressions_are_what_the_tensors_say(
    config: dict[str, Any], layers: set[int] | None, tmp_path: Path
) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "adapter", TINY, config=config), TINY)
    found = {one.layer for one in adapter.weights}
    assert found == (layers or set(range(TINY.num_hidden_layers)))


def test_one_layer_may_be_a_number(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", TINY, config={"layers_to_transform": [1]})
    _change_config(folder, layers_to_transform=1)
    assert {one.layer for one in read_adapter(folder, TINY).weights} == {1}


def test_another_base_model_of_these_shapes_is_a_warning(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "adapter", TINY, config={"base_model_name_or_path": "org/other-model"}
    )
    warning = read_adapter(folder, TINY).warning
    assert warning is not None
    assert "org/other-model" in warning
    assert "tiny" in warning
    _change_config(folder, base_model_name_or_path="/somewhere/else/Tiny/")
    assert read_adapter(folder, TINY).warning is None


def _change_config(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("use_qalora", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("use_bdlora", {"nblocks": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", ["gaussian"]),
        ("layers_pattern", "h"),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", "all"),
        ("layers_to_transform", True),
        ("r", 0),
        ("r", "8"),
        ("r", None),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", 1e9),
        ("use_rslora", "yes"),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [1]),
        ("exclude_modules", 3),
        ("rank_pattern", [8]),
        ("rank_pattern", {"(a+)+b": 8}),
        ("rank_pattern", {"(a|b)*": 8}),
        ("rank_pattern", {".*.*.*": 8}),
        ("rank_pattern", {"(": 8}),
        ("rank_pattern", {"q{1,9999}": 8}),
        ("rank_pattern", {"x" * 300: 8}),
        ("rank_pattern.q_proj.r", {"q_proj": 0}),
        ("alpha_pattern.q_proj", {"q_proj": "1"}),
        ("some_new_thing", True),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(
    field: str, value: object, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", TINY)
    _change_config(folder, **{field.partition(".")[0]: value})
    with pytest.raises(ConfigError) as caught:
        read_adapter(folder, TINY)
    assert caught.value.field == field
    assert CONFIG_FILE in str(caught.value)


def test_fields_that_change_nothing_are_let_through(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "adapter",
        TINY,
        config={
            "lora_dropout": 0.1,
            "inference_mode": True,
            "auto_mapping": None,
            "loftq_config": {},
            "peft_version": "0.21.2",
            "init_lora_weights": "gaussian",
            "megatron_core": "megatron.core",
            "some_new_thing": None,
            "another": False,
        },
    )
    assert len(read_adapter(folder, TINY).weights) == 2 * TINY.num_hidden_layers


def _without_b(tensors: Tensors) -> None:
    del tensors[Q.replace("lora_A", "lora_B")]


def _without_module(tensors: Tensors) -> None:
    _without_b(tensors)
    del tensors[Q]


def _renamed(name: str) -> Any:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors.pop(Q)

    return change


def _as(values: torch.Tensor) -> Any:
    def change(tensors: Tensors) -> None:
        tensors[Q] = values

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_without_b, r"q_proj\.lora_B\.weight' is missing"),
        (_without_module, r"no lora_A and lora_B of model\.layers\.0\.self_attn\.q_proj"),
        (_renamed(Q.replace("model.layers.0", "model.layers.99")), "belongs to no linear layer"),
        (_renamed("base_model.model.lm_head.lora_A.weight"), "belongs to no linear layer"),
        (_renamed("base_model.model.model.norm.lora_A.weight"), "belongs to no linear layer"),
        (_renamed(Q.replace("lora_A", "lora_magnitude_vector")), "no lora_A or lora_B"),
        (_renamed(Q.replace("lora_A.weight", "lora_A.default.weight")), "no lora_A or lora_B"),
        (_renamed("model.embed_tokens.weight"), "no lora_A or lora_B"),
        (_renamed("base_model.model.model.embed_tokens.lora_embedding_A"), "no lora_A or lora_B"),
        (_as(torch.zeros(8, 7)), r"is \[8, 7\]"),
        (_as(torch.zeros(4, 96)), r"is \[4, 96\]"),
        (_as(torch.zeros(8, 96, dtype=torch.float64)), "holds float64"),
        (_as(torch.zeros(8, 96, dtype=torch.int8)), "holds int8"),
    ],
)
def test_a_tensor_that_does_not_belong_is_refused_by_name(
    change: Any, problem: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", TINY, change=change)
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_adapter(folder, TINY)
    assert caught.value.file == str(folder / WEIGHTS_FILE)


def test_tensors_that_are_not_targeted_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", TINY, config={"target_modules": ["q_proj"]})
    with pytest.raises(CheckpointError, match=r"v_proj, which .* does not target"):
        read_adapter(folder, TINY)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", TINY)
    with pytest.raises(CheckpointError, match="own base model"):
        read_adapter(folder, resolve("llama-3.2-1b"))


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_folder_without_its_files_is_refused(missing: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", TINY)
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=f"has no {missing}"):
        read_adapter(folder, TINY)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", TINY)
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        read_adapter(folder, TINY)


def test_a_missing_folder_a_file_and_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", TINY)
    with pytest.raises(ModelNotFoundError):
        read_adapter(tmp_path / "nothing", TINY)
    with pytest.raises(ModelNotFoundError, match="is a file"):
        read_adapter(folder / WEIGHTS_FILE, TINY)
    with pytest.raises(CheckpointError, match="home folder"):
        read_adapter(Path("~nobody-of-this-name/adapter"), TINY)
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        read_adapter(folder, TINY)
    (folder / CONFIG_FILE).write_text("{]")
    with pytest.raises(ConfigError, match="not JSON"):
        read_adapter(folder, TINY)


def test_reading_one_needs_no_torch(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", TINY, ATTENTION)
    script = (
        f"import sys, oomproof; plan = oomproof.plan('tiny', adapter={str(folder)!r}); "
        "assert plan.adapter.rank == 8; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
