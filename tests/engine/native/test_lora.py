"""A LoRA adapter in the native engine: what peft computes, in memory that was planned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from oomproof.engine.native import device as native_device
from oomproof.engine.native.engine import NativeEngine
from oomproof.engine.native.linears import TiledLinears
from oomproof.engine.native.load import load_engine
from oomproof.engine.native.weights import LayerWeights, StepProducts
from oomproof.errors import CheckpointError, PlanMismatchError
from oomproof.hardware.probe import probe
from oomproof.models.adapter import with_adapter
from oomproof.models.resolve import bundled_folder, resolve, with_checkpoint
from oomproof.models.spec import ModelSpec
from oomproof.session import plan
from tests.compat.checkpoints import random_checkpoint
from tests.engine.native.test_engine import assert_greedy, prompts, reference_model, request, run
from tests.models.adapters import ALL, ATTENTION, Tensors, write_adapter

TINY = "tiny"
FLOAT32: dict[str, Any] = {"compute_dtype": "float32", "kv_format": "fp32"}
CASES: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "queries and values": (ATTENTION, {}),
    "all linears": (ALL, {"rank": 16}),
    "a rank that is no multiple of eight": (ALL, {"rank": 3}),
    "rank 1 of the gate alone": (("gate_proj",), {"rank": 1}),
    "up and down": (("up_proj", "down_proj"), {"rank": 5}),
    "keys and outputs": (("k_proj", "o_proj"), {}),
    "ranks and scales by pattern": (
        ALL,
        {
            "config": {
                "rank_pattern": {"q_proj": 24, r"layers\.1\.mlp\.up_proj": 2},
                "alpha_pattern": {"v_proj": 1, "model.layers.0.mlp.gate_proj": 40},
            }
        },
    ),
    "scales by the root of the rank": (ALL, {"config": {"use_rslora": True}}),
    "some layers": (ALL, {"config": {"layers_to_transform": [1, 3]}}),
    "a regular expression": (ATTENTION, {"config": {"target_modules": r".*\.(q|v)_proj"}}),
    "16 bits": (ALL, {"dtype": torch.bfloat16}),
}


def adapted(spec: ModelSpec, folder: Path) -> ModelSpec:
    return with_adapter(with_checkpoint(spec), folder)


def engine_with(adapter: Path, model: Path | str = TINY, **options: Any) -> NativeEngine:
    planned = plan(model, engine="native", adapter=adapter, **options)
    spec = adapted(resolve(str(model)), adapter)
    return load_engine(planned, spec, probe(), Path(spec.source.path))


@torch.inference_mode()
def logprobs_of(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
    wanted = torch.tensor(tokens[1:]).unsqueeze(1)
    found: torch.Tensor = logits[:-1].log_softmax(dim=1).gather(1, wanted).squeeze(1)
    return found


def scores_of(engine: NativeEngine, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([one.logprob for one in engine.score(tokens, 1)], dtype=torch.float64)


def peft_model(adapter: Path, format_name: str = "fp32") -> Any:
    base = reference_model(bundled_folder(), format_name)
    return peft.PeftModel.from_pretrained(base, str(adapter)).eval()


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_peft_computes(case: str, tmp_path: Path) -> None:
    modules, options = CASES[case]
    folder = write_adapter(tmp_path / "adapter", resolve(TINY), modules, **options)
    engine = engine_with(folder, format="fp32", context=256)
    tokens = prompts(1, 2048, 1)[0] + list(range(100, 190))
    found, expected = scores_of(engine, tokens), logprobs_of(peft_model(folder), tokens)
    bare = logprobs_of(reference_model(bundled_folder(), "fp32"), tokens)
    assert float((found - expected).abs().max()) < 2e-4
    assert float((bare - expected).abs().max()) > 1e-2
    engine.close()


def test_it_computes_what_peft_made_and_saved(tmp_path: Path) -> None:
    base = reference_model(bundled_folder(), "fp32")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear")
    made = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05)
    made.save_pretrained(str(tmp_path))
    engine = engine_with(tmp_path, format="fp32", context=256)
    tokens = list(range(100, 160))
    assert float((scores_of(engine, tokens) - logprobs_of(made.eval(), tokens)).abs().max()) < 2e-4
    engine.close()


@pytest.mark.parametrize("format_name", ["nf4-dq", "int8", "int4", "bf16"])
def test_it_is_added_to_quantized_weights_as_they_are(format_name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve(TINY), ALL)
    compute = {} if format_name == "bf16" else FLOAT32
    engine = engine_with(folder, format=format_name, context=256, **compute)
    tokens = list(range(100, 190))
    expected = logprobs_of(peft_model(folder, format_name), tokens)
    bound = 0.3 if format_name == "bf16" else 2e-4
    assert float((scores_of(engine, tokens) - expected).abs().max()) < bound
    engine.close()


@pytest.mark.parametrize("family", ["granite", "qwen2", "qwen3", "llama, tied"])
def test_every_family_adds_it_where_peft_does(family: str, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", family)
    folder = write_adapter(tmp_path / "adapter", resolve(str(model)), ALL)
    engine = engine_with(folder, model, format="fp32", context=256)
    base = reference_model(model, "fp32")
    tokens = list(range(100, 150))
    expected = logprobs_of(peft.PeftModel.from_pretrained(base, str(folder)).eval(), tokens)
    assert float((scores_of(engine, tokens) - expected).abs().max()) < 1e-3
    engine.close()


def test_greedy_answers_in_company_are_pefts(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve(TINY), ALL)
    engine = engine_with(folder, format="nf4-dq", context=256, concurrency=3, **FLOAT32)
    asked = prompts(5, 2048, 60)
    answers = run(engine, [request(str(n), one, 16) for n, one in enumerate(asked)])
    reference = peft_model(folder, "nf4-dq")
    for number, prompt in enumerate(asked):
        assert_greedy(lambda tokens: reference(input_ids=tokens), prompt, answers[str(number)])
    engine.close()


@pytest.mark.parametrize("modules", [ALL, ("up_proj",), ("gate_proj", "q_proj")])
def test_slices_of_up_change_no_answer(
    modules: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve(TINY), modules)
    asked = [prompt * 4 for prompt in prompts(3, 2048, 100)]
    answers = []
    for chunk, rows in ((2048, 4096), (256, 256)):
        monkeypatch.setattr("oomproof.memory.native.CHUNK_TOKENS", chunk)
        monkeypatch.setattr("oomproof.memory.slices.UP_ROWS", rows)
        engine = engine_with(folder, format="fp32", context=512, concurrency=2)
        answers.append(run(engine, [request(str(n), one, 12) for n, one in enumerate(asked)]))
        engine.close()
    assert answers[0] == answers[1]


def test_memory_is_what_was_planned_and_stays_where_it_is(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve(TINY), ALL, rank=12)
    engine = engine_with(folder, format="nf4-dq", context=256, **FLOAT32)
    planned, [device] = engine._plan, engine._running.devices
    assert planned.adapter is not None
    assert device.lora is not None
    assert device.lora.memory.nbytes == planned.adapter.weights_bytes
    assert device.weights.nbytes == planned.devices[0].terms.weights
    bare = plan(TINY, engine="native", format="nf4-dq", context=256, **FLOAT32)
    more = planned.devices[0].terms.weights - bare.devices[0].terms.weights
    assert more == device.lora.memory.nbytes
    assert planned.devices[0].terms.workspace > bare.devices[0].terms.workspace
    before = device.lora.memory.data_ptr(), device.lora.memory.clone()
    run(engine, [request("x", range(100, 140), 8)])
    assert device.lora.memory.data_ptr() == before[0]
    assert torch.equal(device.lora.memory, before[1])
    assert device.arena.layout.buffers["lora"].size_bytes > 0
    engine.close()


def test_the_scale_is_multiplied_before_b_is_rounded(tmp_path: Path) -> None:
    modules, rank = ("o_proj",), 3
    folder = write_adapter(
        tmp_path / "adapter", resolve(TINY), modules, rank=rank, config={"lora_alpha": 5}
    )
    engine = engine_with(folder, format="bf16", context=256)
    [device] = engine._running.devices
    spec = adapted(resolve(TINY), folder)
    assert spec.adapter is not None
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    first = spec.adapter.weights[0]
    assert device.lora is not None
    lora = device.lora.layer(first.layer).o
    assert lora is not None
    [factor] = lora._b
    assert torch.equal(factor[:, :rank], (tensors[first.b.name] * (5 / 3)).bfloat16())
    assert not factor[:, rank:].any()
    assert torch.equal(lora._a[:rank], tensors[first.a.name].bfloat16())
    engine.close()


def test_another_adapter_than_was_planned_takes_more_than_was_planned(tmp_path: Path) -> None:
    small = write_adapter(tmp_path / "small", resolve(TINY), rank=8)
    large = write_adapter(tmp_path / "large", resolve(TINY), rank=16)
    planned = plan(TINY, engine="native", format="fp32", adapter=small)
    spec = adapted(resolve(TINY), large)
    with pytest.raises(PlanMismatchError, match="weights"):
        load_engine(planned, spec, probe(), bundled_folder())


def test_a_value_that_is_not_finite_is_found_and_named(tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[sorted(tensors)[0]][0, 0] = float("nan")

    folder = write_adapter(tmp_path / "adapter", resolve(TINY), change=damage)
    with pytest.raises(CheckpointError, match=r"lora_A.*not finite"):
        engine_with(folder, format="fp32")


def test_a_scale_that_the_compute_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", resolve(TINY), std=5, config={"lora_alpha": 1e6})
    compute = {"compute_dtype": "float16", "kv_format": "fp16"}
    with pytest.raises(CheckpointError, match="cannot hold once they are scaled"):
        engine_with(folder, format="nf4", context=256, **compute)


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, and the fused products of decode steps, by their references."""
    blocks = native_device._blocks
    monkeypatch.setattr(
        native_device, "_blocks", lambda plan, spec, tiled: blocks(plan, spec, tiled=True)
    )

    def products(self: LayerWeights) -> StepProducts:
        qkv, o, gate_up, down = (part.tiled for part in (self.qkv, self.o, self.gate_up, self.down))
        assert qkv is not None
        assert o is not None
        assert gate_up is not None
        assert down is not None
        return StepProducts(qkv=qkv, o=o, gate_up=gate_up, down=down)

    monkeypatch.setattr(LayerWeights, "_step_products", products)
    monkeypatch.setattr(TiledLinears, "normalises", lambda _, tokens: tokens <= 4)
    monkeypatch.setattr(TiledLinears, "chains", lambda _, tokens, __: 5 <= tokens <= 64)
    monkeypatch.setattr("oomproof.engine.native.stage.may_wait", lambda *_: True)


@pytest.mark.parametrize(
    "modules",
    [ALL, ATTENTION, ("gate_proj",), ("q_proj", "up_proj"), ("o_proj",), ("down_proj", "k_proj")],
)
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_fused_layers_with_an_adapter_are_those_without_fusion(
    modules: Sequence[str],
    layers: list[int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_adapter(
        tmp_path / "adapter",
        resolve(TINY),
        modules,
        config={} if layers is None else {"layers_to_transform": layers},
    )
    asked = [one[:40] for one in prompts(7, 2048, 60)]
    answers = []
    for fused in (False, True):
        if fused:
            _as_on_a_gpu(monkeypatch)
        engine = engine_with(folder, format="nf4-dq", context=256, concurrency=7, **FLOAT32)
        answers.append(run(engine, [request(str(n), one, 6 + n) for n, one in enumerate(asked)]))
        if fused:
            [device] = engine._running.devices
            assert device.layers is not None
            assert device.layers._weights(0).step is not None
        engine.close()
    assert answers[0] == answers[1]
