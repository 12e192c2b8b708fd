"""Checkpoints in 4 bits, read by the native engine without quantizing again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from oomproof.engine.native.engine import NativeEngine
from oomproof.engine.native.layout import lay_out_block
from oomproof.engine.native.load import load_engine
from oomproof.engine.native.stored import StoredWeights
from oomproof.engine.native.weights import Parameter
from oomproof.errors import CheckpointError, LoadError
from oomproof.hardware.probe import probe
from oomproof.loading.pipeline import Limits, load_checkpoint
from oomproof.models.resolve import resolve
from oomproof.models.spec import CheckpointSpec
from oomproof.planning.plan import Plan
from oomproof.session import load, plan
from tests.compat.checkpoints import edit_json, edit_tensors, random_checkpoint
from tests.conversion.jobs import (
    FORMATS,
    SOURCE,
    as_theirs,
    in_shards,
    quantized,
    settings,
    tensors_of,
    transformers_model,
)

PROMPT = "It was a dark night"
GREEDY: Mapping[str, Any] = {"temperature": 0, "max_new_tokens": 12}


def engine_of(folder: Path | str, **options: Any) -> tuple[Plan, NativeEngine]:
    made = plan(folder, engine="native", **options)
    assert (made.engine, made.runnable, made.fits) == ("native", True, True)
    where = SOURCE if folder == "tiny" else Path(folder)
    return made, load_engine(made, resolve(str(folder)), probe(), where)


def parts_of(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """Everything that the engine holds of its parameters, without the gaps between."""
    (device,) = engine._running.devices
    return {
        f"{parameter.placed.spec.name}.{name}": part
        for parameter in device._parameters()
        for name, part in parameter.parts.items()
    }


def check_same(one: NativeEngine, other: NativeEngine) -> None:
    found, expected = parts_of(one), parts_of(other)
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert torch.equal(found[name], part), name


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_checkpoint_of_ours_is_held_bit_for_bit_as_its_source_quantized_while_loading(
    format_name: str, search: bool, tmp_path: Path
) -> None:
    out = quantized(tmp_path / "out", format=format_name, search=search, shard=1 << 20)
    own, engine = engine_of(out)
    source, expected = engine_of("tiny", format=format_name, search=search)
    assert (own.format, own.quantized_checkpoint) == (format_name, "bitsandbytes")
    assert own.devices[0].terms == source.devices[0].terms
    check_same(engine, expected)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_checkpoint_of_transformers_is_held_with_its_own_bits(
    format_name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    transformers_model(SOURCE, format_name).save_pretrained(folder)
    _, engine = engine_of(folder)
    (device,) = engine._running.devices
    stored = tensors_of(folder)
    seen = 0
    for parameter in device._parameters():
        name = parameter.placed.spec.name
        if not parameter.placed.held.quantized:
            continue
        for part, values in parameter.parts.items():
            if part == "nested_offset":
                continue
            file_name = name if part == "weight" else f"{name}.{part}"
            assert torch.equal(values.view(-1), stored[file_name].view(-1)), file_name
            seen += 1
    assert seen == 35 * (5 if format_name.endswith("-dq") else 3)


@pytest.mark.parametrize("family", ["llama, tied", "llama, stretched", "qwen2", "qwen3", "granite"])
def test_families_answer_from_a_checkpoint_as_from_their_source(
    family: str, tmp_path: Path
) -> None:
    source = random_checkpoint(tmp_path / "source", family)
    out = quantized(tmp_path / "out", source)
    with load(source, format="nf4-dq", search=True, engine="native") as model:
        expected = model.generate(PROMPT, **GREEDY)
    with load(out, engine="native") as model:
        assert model.plan.engine == "native"
        assert model.generate(PROMPT, **GREEDY) == expected


def test_modules_that_the_checkpoint_keeps_in_16_bits_stay_so(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    skipping = settings("nf4")
    skipping.llm_int8_skip_modules = ["lm_head", "k_proj", "model.layers.2.mlp"]
    theirs = AutoModelForCausalLM.from_pretrained(
        SOURCE, dtype=torch.bfloat16, quantization_config=skipping, device_map={"": "cpu"}
    )
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SOURCE / name).read_bytes())
    made, engine = engine_of(folder)
    (device,) = engine._running.devices
    kept = {
        parameter.placed.spec.name: parameter.placed.held.quantized
        for parameter in device._parameters()
        if parameter.placed.spec.name.endswith("_proj.weight")
    }
    assert not kept["model.layers.0.self_attn.k_proj.weight"]
    assert not kept["model.layers.2.mlp.up_proj.weight"]
    assert kept["model.layers.1.mlp.up_proj.weight"]
    with load(made) as model:
        answer = model.generate(PROMPT, **GREEDY)
    with load(folder, engine="transformers") as model:
        assert model.generate(PROMPT, **GREEDY)[:8] == answer[:8]


NAME = "model.layers.3.mlp.down_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def as_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def replaced(name: str, old: str, new: str) -> Any:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        text = bytes(tensors[name].tolist()).decode()
        assert old in text
        tensors[name] = as_bytes(text.replace(old, new))

    return edit


DAMAGES: Mapping[str, tuple[Any, str]] = {
    "block size": (replaced(STATE, '"blocksize": 64', '"blocksize": 128'), "has blocksize 128, no"),
    "shape": (replaced(STATE, "512", "511"), r"has shape \[256, 511\], not \[256, 512\]"),
    "type": (replaced(STATE, "nf4", "fp4"), "has quant_type 'fp4', not 'nf4'"),
    "nested": (
        replaced(
            STATE,
            "256,",
            "512,",
        ),
        "has ",
    ),
    "offset": (replaced(STATE, '"nested_offset": ', '"nested_offset": "x", "y": '), "no number"),
    "huge offset": (replaced(STATE, '"nested_offset": ', '"nested_offset": 1e39, "y": '), "no num"),
    "not JSON": (lambda t: t.update({STATE: as_bytes("{")}), "not valid JSON"),
    "no object": (lambda t: t.update({STATE: as_bytes("[]")}), "not a JSON object"),
    "NaN offset": (
        replaced(STATE, '"nested_offset": ', '"nested_offset": NaN, "y": '),
        "NaN is no",
    ),
    "no UTF-8": (lambda t: t[STATE].fill_(255), "not valid JSON"),
    "too long": (lambda t: t.update({STATE: as_bytes(" " * 5000)}), "at most 4096 bytes"),
    "empty": (lambda t: t.update({STATE: as_bytes("")}), "at most 4096 bytes"),
    "table": (lambda t: t[f"{NAME}.quant_map"].add_(1e-3), "is another table than nf4-dq is def"),
    "nested table": (lambda t: t[f"{NAME}.nested_quant_map"].mul_(2), "is another table than nf4-"),
    "NaN scale": (
        lambda t: t[f"{NAME}.nested_absmax"].fill_(float("nan")),
        "value that is not fin",
    ),
    "short scales": (
        lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:-1].clone()}),
        r"absmax' is uint8 \[2047\], nf4-dq of \[256, 512\] has uint8 \[2048\]",
    ),
    "wide scales": (
        lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"].float()}),
        r"absmax' is float32 \[2048\], nf4-dq of",
    ),
    "no state": (
        lambda t: t.pop(STATE),
        "and the weights lack 'model.layers.3.mlp.down_proj.weigh",
    ),
    "no scales": (
        lambda t: t.pop(f"{NAME}.absmax"),
        "and the weights lack 'model.layers.3.mlp.dow",
    ),
    "flat codes": (
        lambda t: t.update({NAME: t[NAME].view(-1).clone()}),
        r"is uint8 \[65536\], nf4",
    ),
    "more": (
        lambda t: t.update({f"{NAME}.more": as_bytes("x")}),
        "1 unexpected parameters: model.",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_what_is_damaged_is_one_error_that_names_it(damage: str, tmp_path: Path) -> None:
    edit, message = DAMAGES[damage]
    out = quantized(tmp_path / "out")
    (out / "oomproof-manifest.json").unlink()
    edit_tensors(out, edit)
    with pytest.raises((CheckpointError, LoadError), match=message), load(out, engine="native"):
        pass


def test_a_config_of_another_format_than_its_weights_is_refused(tmp_path: Path) -> None:
    out = quantized(tmp_path / "out", format="nf4")
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"nf4"', '"fp4"'))
    (out / "oomproof-manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json says fp4, and the weights lack"):
        plan(out)
    (out / "config.json").write_text(text)
    edit_json(out / "config.json", num_hidden_layers=6)
    with pytest.raises(CheckpointError, match=r"and the weights lack 'model.layers.5"):
        plan(out)


def test_shards_are_read_too(tmp_path: Path) -> None:
    out = as_theirs(tmp_path / "out", in_shards(tmp_path / "source"), shard=1 << 20)
    _, engine = engine_of(out)
    _, expected = engine_of("tiny", format="nf4-dq")
    check_same(engine, expected)


SMALL = Limits(piece_bytes=8192, slice_bytes=20_000)
"""So that a weight comes in many slices."""


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles on a processor too, filled slice by slice."""
    monkeypatch.setattr(
        "oomproof.engine.native.device.lay_out_block",
        lambda unit, name, **_: lay_out_block(unit, name, tiled=True),
    )
    monkeypatch.setattr(
        "oomproof.engine.native.load.load_checkpoint", partial(load_checkpoint, limits=SMALL)
    )


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("format_name", FORMATS)
def test_tiles_are_filled_with_the_same_bits(format_name: str, tmp_path: Path) -> None:
    out = quantized(tmp_path / "out", format=format_name)
    _, engine = engine_of(out)
    _, expected = engine_of("tiny", format=format_name, search=True)
    (device,) = engine._running.devices
    assert any(parameter.placed.tiling is not None for parameter in device._parameters())
    check_same(engine, expected)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_layer_that_is_streamed_comes_home_through_a_buffer(
    format_name: str, tmp_path: Path
) -> None:
    out = quantized(tmp_path / "out", format=format_name)
    _, engine = engine_of(out)
    (device,) = engine._running.devices
    spec = resolve(str(out))
    checkpoint, quantization = spec.checkpoint, spec.checkpoint_quantization
    assert checkpoint is not None
    assert quantization is not None
    held = StoredWeights(out, checkpoint, quantization)
    buffer = torch.empty(max(b.size_bytes for b in device._blocks), dtype=torch.uint8)
    targets, homes = [], []
    for layer in (0, 1):
        block = device._blocks[layer + 1]
        home = torch.zeros(block.size_bytes, dtype=torch.uint8)
        for placed in block.placed:
            away, there = Parameter(placed, buffer), Parameter(placed, home)
            homes.append(there)
            targets += (
                held.targets(away, there.parts)
                if placed.held.quantized
                else [away.target(torch.empty(0), there.parts)]
            )
    names = {target.name for target in targets}
    tensors = tuple(one for one in checkpoint.tensors if one.name in names)
    load_checkpoint(
        out, CheckpointSpec(tensors=tensors, files=checkpoint.files), targets, limits=SMALL
    )
    expected = parts_of(engine)
    for there in homes:
        for name, part in there.parts.items():
            assert torch.equal(part, expected[f"{there.placed.spec.name}.{name}"]), name


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_on_a_gpu_tiles_are_those_of_its_source(
    format_name: str, offload: str, tmp_path: Path
) -> None:
    source = random_checkpoint(
        tmp_path / "source", hidden_size=512, intermediate_size=1024, num_hidden_layers=6
    )
    out = as_theirs(tmp_path / "out", source, format=format_name, device="cuda")
    options: dict[str, Any] = {"offload": offload, "force": True} if offload == "cpu" else {}
    if offload == "cpu":
        whole = plan(source, format=format_name).devices[0].peak_bytes
        options["max_memory"] = {0: whole - 3 * 1024 * 1024}
    answers = []
    for folder in (source, out):
        with load(folder, format=format_name, engine="native", **options) as model:
            assert model.plan.engine == "native"
            answers.append(model.generate(PROMPT, **GREEDY))
    assert answers[0] == answers[1]
    if offload == "none":
        _, engine = engine_of(out)
        _, expected = engine_of(source, format=format_name)
        check_same(engine, expected)
