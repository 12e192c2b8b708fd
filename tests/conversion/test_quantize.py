"""What `quantize` writes: transformers' own tensors, to the bit, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from oomproof.conversion.layout import (
    QUANTIZE_FORMATS,
    choose_dtype,
    lay_out,
    refuse_unquantizable,
)
from oomproof.conversion.manifest import MANIFEST_FILE, read_manifest, verify
from oomproof.conversion.quantize import prepare
from oomproof.errors import CheckpointError, InputError
from oomproof.formats import FIT, FORMATS, DType
from oomproof.models.resolve import resolve
from oomproof.quantization.reference import unpack
from oomproof.session import plan, quantize
from oomproof.units import MIB
from tests.compat.checkpoints import edit_json, random_checkpoint
from tests.conversion.jobs import (
    BLOCK_SCALES,
    SOURCE,
    TOKENS,
    as_theirs,
    check_logits,
    files_of,
    in_shards,
    logits_of,
    quantized,
    settings,
    tensors_of,
    transformers_model,
)
from tests.conversion.jobs import (
    FORMATS as WRITTEN,
)


@pytest.mark.parametrize("format_name", WRITTEN)
def test_transformers_loads_the_folder_with_the_logits_of_its_own_quantization(
    format_name: str, tmp_path: Path
) -> None:
    ours = transformers_model(as_theirs(tmp_path / "out", format=format_name))
    assert ours.is_loaded_in_4bit
    check_logits(ours, transformers_model(SOURCE, format_name), format_name)


@pytest.mark.parametrize("format_name", WRITTEN)
def test_every_tensor_is_what_transformers_saves(format_name: str, tmp_path: Path) -> None:
    ours = tensors_of(as_theirs(tmp_path / "out", format=format_name))
    transformers_model(SOURCE, format_name).save_pretrained(tmp_path / "theirs")
    theirs = tensors_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        found = ours[name]
        if "quant_state" in name and format_name.endswith("-dq"):
            # Ours ends in spaces: its length is known before the offset that it holds is.
            text = bytes(found.tolist()).rstrip()
            assert json.loads(text) == json.loads(bytes(tensor.tolist()))
            continue
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        differ = found.view(torch.uint8) != tensor.view(torch.uint8)
        if name.endswith(".absmax") and format_name.endswith("-dq"):
            assert differ.float().mean() < 0.02
            assert (found.int() - tensor.int()).abs().max() <= 1
        elif name.endswith("_proj.weight") and format_name.startswith("fp4"):
            zeros = torch.tensor([*range(8), 0, *range(9, 16)], dtype=torch.uint8)
            codes = [zeros[unpack(one.reshape(-1)).long()] for one in (found, tensor)]
            assert (codes[0] != codes[1]).float().mean() < 2e-3
        else:
            assert not differ.any(), name
    for one in (tmp_path / "out", tmp_path / "theirs"):
        config = json.loads((one / "config.json").read_text())
        config.pop("transformers_version")
        edit_json(one / "config.json", transformers_version=None)
        assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    read = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("out", "theirs")]
    assert read[0]["quantization_config"].pop(BLOCK_SCALES) == "absmax"
    assert read[0] == read[1]


@pytest.mark.parametrize(
    "family", ["llama, tied", "llama, stretched", "qwen2", "qwen3", "granite", "gemma2", "phi3"]
)
def test_other_families_are_written_as_transformers_quantizes_them(
    family: str, tmp_path: Path
) -> None:
    source = random_checkpoint(tmp_path / "source", family)
    ours = transformers_model(as_theirs(tmp_path / "out", source, format="nf4"))
    check_logits(ours, transformers_model(source, "nf4"), "nf4")


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("asked", ["auto", "bf16", "fp16", "float32"])
def test_weights_of_another_type_are_quantized_from_the_type_that_they_are_computed_in(
    stored: torch.dtype, asked: str, tmp_path: Path
) -> None:
    def cast(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.float().add(1e-5).to(stored)

    source = random_checkpoint(tmp_path / "source", edit=cast)
    edit_json(source / "config.json", dtype=str(stored).removeprefix("torch."))
    out = as_theirs(tmp_path / "out", source, dtype=asked, format="nf4")
    expected = {
        "auto": torch.float16 if stored is torch.float16 else torch.bfloat16,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "float32": torch.float32,
    }[asked]
    ours, theirs = transformers_model(out), transformers_model(source, "nf4", expected)
    assert ours.dtype is expected
    check_logits(ours, theirs, "nf4")


def test_a_value_that_float16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = random_checkpoint(
        tmp_path / "source", edit=lambda tensors: tensors[name].view(-1)[5:6].fill_(1e6)
    )
    with pytest.raises(CheckpointError, match=f"{name}.* holds 999424, float16 ends at 65504"):
        quantize(source, tmp_path / "out", dtype="fp16", device="cpu")
    assert not (tmp_path / "out").exists()


def test_shards_are_bounded_indexed_and_each_from_one_of_the_source(tmp_path: Path) -> None:
    source = in_shards(tmp_path / "source")
    out = as_theirs(tmp_path / "out", source, shard=MIB, format="nf4")
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    largest = 2048 * 256 * 2
    assert all(path.stat().st_size <= max(MIB, largest) + 16 * 1024 for path in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = tensors_of(out)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert torch.equal(
        logits_of(transformers_model(out)), logits_of(transformers_model(SOURCE, "nf4"))
    )
    output = lay_out(resolve(str(source)), "nf4", DType.BFLOAT16, shard_bytes=MIB)
    for shard in output.shards:
        assert {one.source.file for one in shard.conversions} == {shard.source_file}


@pytest.mark.parametrize("format_name", WRITTEN)
def test_the_output_has_the_bytes_that_were_foretold(format_name: str, tmp_path: Path) -> None:
    job = prepare(resolve("tiny"), tmp_path / "out", format_name=format_name, device="cpu")
    out = quantized(tmp_path / "out", format=format_name)
    assert job.output_bytes == sum(map(len, files_of(out).values()))


def test_every_file_is_in_the_manifest_and_a_flipped_bit_is_found(tmp_path: Path) -> None:
    out = quantized(tmp_path / "out")
    manifest = read_manifest(out)
    assert manifest is not None
    assert {one.file for one in manifest.files} == {*files_of(out)} - {MANIFEST_FILE}
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= {*files_of(out)}
    assert verify(out) == manifest
    assert verify(SOURCE) is None
    for name, content in files_of(out).items():
        if name == MANIFEST_FILE:
            continue
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 4
        (out / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"has sha256 .* it was written with") as refused:
            verify(out)
        assert refused.value.file == str(out / name)
        (out / name).write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match="bytes, it was written with"):
            verify(out)
        (out / name).write_bytes(content)


def test_the_same_job_twice_finds_it_done_and_another_is_refused(tmp_path: Path) -> None:
    out = quantized(tmp_path / "out")
    before = files_of(out)
    again = quantize("tiny", out, device="cpu")
    assert (again.resumed_files, again.was_there) == (1, True)
    assert files_of(out) == before
    holds = "holds tiny in nf4-dq and bfloat16, block scales searched: give another name, or remove"
    for options in ({"format": "nf4"}, {"search": False}):
        with pytest.raises(InputError, match=holds):
            quantize("tiny", out, device="cpu", **options)
    (tmp_path / "empty").mkdir()
    assert files_of(quantized(tmp_path / "empty")) == before


def test_a_dtype_is_the_checkpoints_own_unless_told() -> None:
    spec = resolve("tiny")
    assert choose_dtype(spec, "auto") is DType.BFLOAT16
    assert choose_dtype(spec, "float16") is choose_dtype(spec, "fp16") is DType.FLOAT16
    with pytest.raises(InputError, match="unknown dtype 'int8': use"):
        choose_dtype(spec, "int8")


def test_only_formats_that_bitsandbytes_takes_are_written() -> None:
    assert set(QUANTIZE_FORMATS) == set(WRITTEN)


@pytest.mark.parametrize("format_name", sorted({*FORMATS, FIT} - set(QUANTIZE_FORMATS)))
def test_formats_that_are_not_written_are_refused(format_name: str, tmp_path: Path) -> None:
    message = f"^{format_name} is not written to disk, only bitsandbytes' 4-bit formats are: use "
    with pytest.raises(InputError, match=message):
        quantize("tiny", tmp_path / "out", format=format_name)


def test_nothing_is_written_into_the_source(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    for place in ("source/out", "link/out", "source/deep/er"):
        with pytest.raises(InputError, match="lies in the folder of the model itself: give anothe"):
            quantize(source, tmp_path / place, device="cpu")
    assert quantized(tmp_path / "source-nf4", source).is_dir()


def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    out = quantized(tmp_path / "out")
    with pytest.raises(InputError, match=r"already quantized .bitsandbytes.: quantize the 16-bit"):
        quantize(out, tmp_path / "again")


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_mixtures_of_experts_are_refused_for_transformers_keeps_experts_in_16_bits(
    family: str, tmp_path: Path
) -> None:
    source = random_checkpoint(tmp_path / "source", family)
    with pytest.raises(
        InputError, match=r"is a mixture of experts, and .*: quantize a dense model"
    ):
        quantize(source, tmp_path / "out")
    theirs = transformers_model(source, "nf4")
    kept = [name for name, one in theirs.named_parameters() if "experts" in name]
    assert kept
    assert all(theirs.get_parameter(name).dtype is torch.bfloat16 for name in kept)


def test_a_model_with_a_vision_tower_is_refused() -> None:
    spec = resolve("gemma-3-27b")
    assert spec.extra_modules
    with pytest.raises(InputError, match=r"a vision tower.*: let transformers quantize it while"):
        refuse_unquantizable(spec, "nf4")


def test_a_tensor_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    source = random_checkpoint(
        tmp_path / "source",
        edit=lambda tensors: tensors.update({"model.extra.weight": torch.zeros(4)}),
    )
    with pytest.raises(CheckpointError, match=r"holds 'model.extra.weight', which config.json"):
        quantize(source, tmp_path / "out", device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_half_written(
    value: float, tmp_path: Path
) -> None:
    source = in_shards(tmp_path / "source")
    file = source / "model-00002-of-00003.safetensors"
    edit_file(file, lambda tensor: tensor.view(-1)[-1:].fill_(value))
    with pytest.raises(CheckpointError, match="holds a value that is not finite") as refused:
        quantize(source, tmp_path / "out", device="cpu")
    assert refused.value.file == str(file)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.part"))


def edit_file(path: Path, edit: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    edit(next(iter(tensors.values())))
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_plan_of_the_folder_has_its_format(tmp_path: Path) -> None:
    made = plan(quantized(tmp_path / "out", format="fp4-dq"))
    assert (made.format, made.quantized_checkpoint) == ("fp4-dq", "bitsandbytes")


_MEASURED = """
import sys, threading, time, psutil, torch
from pathlib import Path
from oomproof.models.resolve import resolve
from oomproof.conversion import quantize as q
from oomproof.session import quantize
quantize("tiny", sys.argv[1] + "/warm", device="cpu")  # libraries, thread pools
process = psutil.Process()
out = Path(sys.argv[1]) / "out"
job = q.prepare(resolve(sys.argv[2]), out, format_name=sys.argv[3], device="cpu")
start, peak, stop = process.memory_info().rss, 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, process.memory_info().rss)
thread = threading.Thread(target=watch); thread.start()
q.run(job)
stop.set(); thread.join()
print(peak - start, job.host_bytes)
"""


@pytest.mark.parametrize("format_name", ["nf4", "nf4-dq"])
def test_memory_is_bounded_whatever_the_size(format_name: str, tmp_path: Path) -> None:
    source = random_checkpoint(
        tmp_path / "source",
        hidden_size=1024,
        intermediate_size=16384,
        num_hidden_layers=3,
        vocab_size=65536,
        num_attention_heads=16,
    )
    size = (source / "model.safetensors").stat().st_size
    ended = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path), str(source), format_name],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, bound = map(int, ended.stdout.split())
    assert grown < bound < size


def test_the_bound_of_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    bounds = set()
    for layers in (1, 5):
        source = random_checkpoint(tmp_path / f"{layers}", num_hidden_layers=layers)
        job = prepare(resolve(str(source)), tmp_path / "out", format_name="nf4-dq", device="cpu")
        bounds.add(job.host_bytes)
    assert len(bounds) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", WRITTEN)
def test_on_a_gpu_every_bit_and_logit_is_transformers_own(format_name: str, tmp_path: Path) -> None:
    out = as_theirs(tmp_path / "out", format=format_name, device="cuda")
    if format_name == "nf4":  # others sum or divide on a GPU in another order
        assert read_manifest(out) == read_manifest(as_theirs(tmp_path / "cpu", format=format_name))
    ours = AutoModelForCausalLM.from_pretrained(out, dtype="auto", device_map={"": "cuda"})
    theirs = AutoModelForCausalLM.from_pretrained(
        SOURCE,
        dtype=torch.bfloat16,
        device_map={"": "cuda"},
        quantization_config=settings(format_name),
    )
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    with torch.inference_mode():
        tokens = TOKENS.cuda()
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
