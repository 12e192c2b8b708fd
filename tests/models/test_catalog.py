from __future__ import annotations

import re
import subprocess
import sys

import pytest

from oomproof.formats import DType
from oomproof.models import catalog
from tests.models.configs import transformers_model

# As printed by the hub for the published safetensors files, or by the model's paper.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-27b": 27_432_406_640,
    "phi-4": 14_659_507_200,
    "gpt-oss-120b": 116_829_156_672,
}


def entry(name: str) -> catalog.CatalogEntry:
    found = catalog.find(name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", catalog.names())
def test_our_tensors_add_up_to_the_published_parameter_count(name: str) -> None:
    model = entry(name)
    spec = model.spec()
    assert spec.num_parameters == model.parameters
    digits, decimals, unit = _parse(model.published)
    rounded = round(spec.num_parameters / {"M": 10**6, "B": 10**9}[unit], decimals)
    assert rounded == pytest.approx(digits)


def _parse(published: str) -> tuple[float, int, str]:
    match = re.fullmatch(r"(\d+(?:\.(\d+))?)([MB])", published)
    assert match is not None
    return float(match[1]), len(match[2] or ""), match[3]


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_known_models_have_their_known_size(name: str, parameters: int) -> None:
    assert entry(name).spec().num_parameters == parameters


@pytest.mark.parametrize("name", catalog.names())
def test_every_repository_of_an_entry_has_its_tensors(name: str) -> None:
    model = entry(name)
    for repository in model.repositories:
        other = entry(repository)
        assert other.repository == repository
        assert other.spec().tensors == model.spec().tensors


def test_every_entry_names_its_source_and_a_16_bit_or_float32_type() -> None:
    for name in catalog.names():
        assert entry(name).source.startswith(f"config.json of {entry(name).repository}")
        assert entry(name).spec().dtype in (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32)


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.1-405b",
        "Llama-3.1-405B",
        "meta-llama/Llama-3.1-405B",
        "META-LLAMA/llama-3.1-405b-instruct",
        "Llama-3.1-405B-Instruct",
    ],
)
def test_a_model_answers_to_its_short_name_and_its_repositories_in_any_case(name: str) -> None:
    assert entry(name).name == "llama-3.1-405b"


def test_a_repository_of_somebody_else_is_not_found() -> None:
    assert catalog.find("somebody/Llama-3.1-8B") is None
    assert catalog.find("") is None


def test_a_repository_keeps_the_fields_in_which_it_differs() -> None:
    assert entry("Qwen/Qwen2.5-7B-Instruct").spec().max_position_embeddings == 32_768
    assert entry("Qwen/Qwen2.5-7B").spec().max_position_embeddings == 131_072
    assert entry("google/gemma-2-9b").spec().dtype is DType.FLOAT32


def test_the_spec_says_what_was_asked_for_and_where_it_comes_from() -> None:
    spec = entry("phi-4").spec(id="microsoft/PHI-4")
    assert spec.id == "microsoft/PHI-4"
    assert (spec.source.kind, spec.source.path) == ("catalog", "microsoft/phi-4")


def test_near_misses_are_suggested() -> None:
    assert catalog.suggest("llama3.1-70b")[0] == "llama-3.1-70b"
    assert "Qwen/Qwen3-8B" in catalog.suggest("Qwen/Qwen3-7B")
    assert catalog.suggest("☃" * 10_000) == []
    assert catalog.suggest("Tinny", "tiny")[0] == "tiny"


def test_a_look_up_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from oomproof.models import catalog\n"
        "catalog.find('llama-3.1-405b').spec()\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("name", catalog.names())
def test_tensors_and_windows_are_those_of_transformers_at_full_size(name: str) -> None:
    model = entry(name)
    spec = model.spec()
    shapes, windows = transformers_model(dict(model.config))
    assert [(tensor.name, tensor.shape) for tensor in spec.tensors] == list(shapes.items())
    assert [layer.sliding_window or 0 for layer in spec.attention] == windows
