"""Checkpoints in 8 bits of others, held code for code and computed as what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from oomproof.engine.native.engine import NativeEngine
from oomproof.engine.native.load import load_engine
from oomproof.errors import CheckpointError, LoadError
from oomproof.formats import ceil_div, held_format
from oomproof.hardware.probe import probe
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.planning.plan import Plan
from oomproof.quantization import reference
from oomproof.session import load, plan
from tests.compat.checkpoints import Tensors, edit_json, edit_tensors, random_checkpoint
from tests.engine.native.stored_layouts import FP8, LAYOUTS, TOKENIZER, decoded_of, published

PROMPT = "It was a dark night"
GREEDY: Mapping[str, Any] = {"temperature": 0, "max_new_tokens": 12}
TOKENS = [1, 17, 400, 1999, 5, 5, 812, 33, 90, 4, 1024, 77]
EXACT: Mapping[str, Any] = {"compute_dtype": "float32", "kv_format": "fp32"}
NAME = "model.layers.3.mlp.down_proj"


def engine_of(folder: Path, **options: Any) -> tuple[Plan, NativeEngine]:
    made = plan(folder, engine="native", context=256, **options)
    assert (made.engine, made.runnable, made.fits) == ("native", True, True)
    return made, load_engine(made, resolve(str(folder)), probe(), folder)


def held_by(engine: NativeEngine) -> dict[str, torch.Tensor]:
    (device,) = engine._running.devices
    return {
        f"{parameter.placed.spec.name}/{name}": part
        for parameter in device._parameters()
        for name, part in parameter.parts.items()
        if parameter.placed.held.quantized
    }


def scores(engine: NativeEngine) -> torch.Tensor:
    return torch.tensor([one.logprob for one in engine.score(TOKENS, 1)])


def expected_scores(folder: Path, *, fp8_inputs: bool) -> torch.Tensor:
    """transformers' own in float32; its linears' inputs through e4m3 where the engine's are."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def through_fp8(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        flat = inputs[0].reshape(-1, inputs[0].shape[-1])
        codes, scale = reference.quantize_rows_fp8(flat)
        return (codes.float() * scale.unsqueeze(1)).view_as(inputs[0])

    for name, module in model.named_modules():
        if fp8_inputs and name.endswith("_proj"):
            module.register_forward_pre_hook(through_fp8)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([TOKENS[:-1]])).logits[0], dim=1)
    wanted = torch.tensor(TOKENS[1:])
    return logprobs.gather(1, wanted.unsqueeze(1)).squeeze(1)


def check_close(found: torch.Tensor, expected: torch.Tensor, *, fp8_inputs: bool) -> None:
    """To rounding; an input between two e4m3 numbers falls to either side, and others follow."""
    apart = (found - expected).abs()
    assert apart.median() < (0.05 if fp8_inputs else 5e-4)
    assert apart.max() < (0.6 if fp8_inputs else 5e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_weights_decoded_by_hand(layout: str, tmp_path: Path) -> None:
    folder, name = published(tmp_path / "model", layout), LAYOUTS[layout].held_as
    made, engine = engine_of(folder, **EXACT)
    assert made.format == name
    expected = expected_scores(decoded_of(folder), fp8_inputs=name == "fp8")
    check_close(scores(engine), expected, fp8_inputs=name == "fp8")
    engine.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_the_files_and_scales_are_their_numbers(layout: str, tmp_path: Path) -> None:
    folder = published(tmp_path / "model", layout)
    made, engine = engine_of(folder)
    stored, held = load_file(folder / "model.safetensors"), held_by(engine)
    seen = 0
    for name, part in held.items():
        weight, _, component = name.partition("/")
        module = weight.removesuffix(".weight")
        if component == "weight":
            assert torch.equal(part.view(torch.uint8), stored[weight].view(torch.uint8).view(-1))
            seen += part.numel()
        elif f"{module}.SCB" in stored:
            exact = stored[f"{module}.SCB"].double() / 127
            ulp = 2.0 ** (exact.log2().floor() - 23)
            assert bool(((part.double() - exact).abs() <= ulp / 2).all())
        else:
            scale = stored.get(f"{module}.weight_scale_inv", stored.get(f"{module}.weight_scale"))
            assert scale is not None
            assert torch.equal(part, scale.float().view(-1).expand(part.shape))
    assert seen == sum(t.numel() for n, t in stored.items() if n.endswith("_proj.weight"))
    planned = sum(
        held_format(made.format).stored_bytes(*spec.shape)
        for spec in resolve(str(folder)).tensors
        if spec.name.endswith("_proj.weight")
    )
    assert sum(part.nbytes for part in held.values()) == planned
    (device,) = engine._running.devices
    assert device.weights.nbytes <= made.devices[0].terms.weights
    engine.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama, tied", "llama, stretched", "qwen3"])
def test_shapes_that_are_no_whole_blocks_and_biases_are_read(
    layout: str, family: str, tmp_path: Path
) -> None:
    source = random_checkpoint(tmp_path / "source", family, hidden_size=144, intermediate_size=200)
    folder = published(tmp_path / "model", layout, source)
    made, engine = engine_of(folder, **EXACT)
    fp8_inputs = made.format == "fp8"
    expected = expected_scores(decoded_of(folder), fp8_inputs=fp8_inputs)
    check_close(scores(engine), expected, fp8_inputs=fp8_inputs)
    engine.close()


def test_what_transformers_saves_in_8_bits_is_held_with_its_own_codes(tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        bundled_folder(),
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
    )
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder)
    for name in TOKENIZER:
        (folder / name).write_bytes((bundled_folder() / name).read_bytes())
    made, engine = engine_of(folder)
    assert (made.format, made.quantized_checkpoint) == ("int8", "bitsandbytes")
    stored, held = load_file(folder / "model.safetensors"), held_by(engine)
    assert any(name.endswith(".weight_format") for name in stored)
    for name, tensor in stored.items():
        if name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            codes = stored[f"{module}.weight"].view(-1)
            assert torch.equal(held[f"{module}.weight/weight"], codes)
            assert torch.equal(held[f"{module}.weight/scale"], tensor / 127)
    engine.close()
    with load(folder) as model:
        assert model.plan.engine == "native"
        answer = model.generate(PROMPT, **GREEDY)
    with load(folder, engine="transformers") as model:
        assert model.plan.format == "llm-int8"
        assert model.generate(PROMPT, **GREEDY)[:8] == answer[:8]


def test_modules_that_the_files_keep_in_16_bits_stay_so(tmp_path: Path) -> None:
    folder = published(tmp_path / "model", "fine-grained")
    kept = load_file(decoded_of(folder) / "model.safetensors")[f"{NAME}.weight"].bfloat16()

    def keep(tensors: Tensors) -> None:
        tensors[f"{NAME}.weight"] = kept
        del tensors[f"{NAME}.weight_scale_inv"]

    edit_tensors(folder, keep)
    _, engine = engine_of(folder)
    assert not any(NAME in name for name in held_by(engine))
    engine.close()


def test_a_row_of_zeros_has_a_scale_of_zero(tmp_path: Path) -> None:
    folder = published(tmp_path / "model", "LLM.int8()")

    def prune(tensors: Tensors) -> None:
        tensors[f"{NAME}.weight"][5].zero_()
        tensors[f"{NAME}.SCB"][5] = 0

    edit_tensors(folder, prune)
    _, engine = engine_of(folder)
    assert held_by(engine)[f"{NAME}.weight/scale"][5] == 0
    engine.close()


# --- damage


def put(part: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        name = f"{NAME}.{part}"
        tensors[name] = value(tensors[name]).contiguous()

    return edit


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def without(part: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        del tensors[f"{NAME}.{part}"]

    return edit


def more(tensors: Tensors) -> None:
    tensors[f"{NAME}.k_scale"] = torch.ones(1)


SCALES = {
    "LLM.int8()": "SCB",
    "fbgemm": "weight_scale",
    "channel": "weight_scale",
    "tensor, static": "weight_scale",
    "fine-grained": "weight_scale_inv",
}


@pytest.mark.parametrize(("layout", "scale"), SCALES.items())
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "the weights lack '{name}.{scale}'"),
        ("short", r"'{name}.{scale}' is \w+ \[[\d, ]*\], [\w-]+ of \[256, 512\] has float32"),
        ("wrong type", r"'{name}.{scale}' is float64 .* has float32"),
        ("NaN", "'{name}.{scale}' holds a value that is not finite"),
        ("infinite", "'{name}.{scale}' holds a value that is not finite"),
        ("negative", "'{name}.{scale}' has a scale below 0"),
        ("zero", "'{name}.{scale}' has a scale of 0 for codes that are not 0"),
        ("codes", r"'{name}.weight' is uint8 \[256, 512\], [\w-]+ of \[256, 512\] has"),
        ("flat codes", r"'{name}.weight' is \w+ \[131072\], [\w-]+ of \[256, 512\] has"),
        ("more", "1 unexpected parameters: {name}.k_scale"),
    ],
)
def test_what_is_damaged_is_one_error_that_names_it(
    layout: str, scale: str, damage: str, message: str, tmp_path: Path
) -> None:
    folder = published(tmp_path / "model", layout)
    edits: dict[str, Callable[[Tensors], None]] = {
        "missing": without(scale),
        "short": put(scale, lambda t: torch.cat((t, t))),
        "wrong type": put(scale, lambda t: t.double()),
        "NaN": put(scale, first(float("nan"))),
        "infinite": put(scale, first(float("inf"))),
        "negative": put(scale, first(-1.0)),
        "zero": put(scale, first(0.0)),
        "codes": put("weight", lambda t: t.view(torch.uint8)),
        "flat codes": put("weight", lambda t: t.view(-1)),
        "more": more,
    }
    edit_tensors(folder, edits[damage])
    told = message.format(name=NAME.replace(".", r"\."), scale=scale)
    with pytest.raises((CheckpointError, LoadError), match=told), load(folder, engine="native"):
        pass


@pytest.mark.parametrize(
    ("layout", "edit", "message"),
    [
        (
            "LLM.int8()",
            put("weight_format", lambda t: t + 1),
            "weight_format' is 1: rows are not one after the other",
        ),
        ("tensor, static", put("input_scale", first(0.0)), "input_scale' has a scale that is not"),
        ("fbgemm", put("input_scale_ub", first(-1.0)), "input_scale_ub' has a scale that is not"),
        (
            "fine-grained",
            put("weight", lambda t: t.view(torch.uint8).fill_(0x7F).view(FP8)),
            "down_proj.weight' holds a value that is not finite",
        ),
    ],
)
def test_so_is_what_lies_beside_the_scales(
    layout: str, edit: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    folder = published(tmp_path / "model", layout)
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=message), load(folder, engine="native"):
        pass


@pytest.mark.parametrize(
    ("layout", "part"), [("LLM.int8()", "weight_format"), ("fbgemm", "input_scale_ub")]
)
def test_what_is_not_used_may_be_missing(layout: str, part: str, tmp_path: Path) -> None:
    folder = published(tmp_path / "model", layout)
    edit_tensors(folder, without(part))
    _, engine = engine_of(folder)
    engine.close()


def test_a_config_of_another_layout_than_its_files_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "model", "fbgemm")
    edit_json(folder / "config.json", quantization_config=dict(LAYOUTS["fine-grained"].config))
    with pytest.raises(CheckpointError, match=r"says fp8-block, and the weights lack .*_scale_inv"):
        plan(folder)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_on_a_gpu_logits_are_those_of_the_weights_decoded_by_hand(
    layout: str, offload: str, tmp_path: Path
) -> None:
    name = LAYOUTS[layout].held_as
    if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    source = random_checkpoint(
        tmp_path / "source", std=0.04, hidden_size=512, intermediate_size=1024, num_hidden_layers=6
    )
    folder = published(tmp_path / "model", layout, source)
    options: dict[str, Any] = {"offload": offload, "force": True} if offload == "cpu" else {}
    if offload == "cpu":
        whole = plan(folder, context=256).devices[0].peak_bytes
        options["max_memory"] = {0: whole - 3 * 1024 * 1024}
    made, engine = engine_of(folder, **options)
    assert (made.format, made.devices[0].kind) == (name, "cuda")
    assert (made.devices[0].streamed_layers is not None) == (offload == "cpu")
    expected = expected_scores(decoded_of(folder), fp8_inputs=name == "fp8")
    # Of scores that lie 1.3 apart; in bfloat16 more inputs fall to the other side than in float32.
    assert (scores(engine) - expected).abs().mean() < (0.3 if name == "fp8" else 0.05)
    engine.close()
    with load(folder, engine="native", **options) as model:
        alone = model.generate(PROMPT, **GREEDY)
        again = [model.generate(PROMPT, **GREEDY) for _ in range(2)]
    assert again == [alone, alone]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu_parts_are_those_of_a_processor(layout: str, tmp_path: Path) -> None:
    if LAYOUTS[layout].held_as == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    folder = published(tmp_path / "model", layout)
    _, engine = engine_of(folder)
    stored = load_file(folder / "model.safetensors")
    for name, part in held_by(engine).items():
        weight, _, component = name.partition("/")
        if component == "weight":
            assert torch.equal(
                part.view(torch.uint8).cpu(), stored[weight].view(torch.uint8).view(-1)
            )
        elif component == "block_scale":
            rows, columns = stored[weight].shape
            assert part.numel() == ceil_div(rows, 128) * ceil_div(columns, 128)
    engine.close()
