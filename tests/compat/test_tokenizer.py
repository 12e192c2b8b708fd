"""A model's own tokenizer, template and generation_config.json, trusted no further than they go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from oomproof.compat.tokenizer import TransformersTokenizer, read_generation_defaults
from oomproof.engine.model import GenerationDefaults
from oomproof.errors import CheckpointError, OomproofError, RequestError
from oomproof.models.resolve import bundled_folder
from tests.compat.checkpoints import copy_of_tiny, edit_json


def read(folder: Path) -> TransformersTokenizer:
    return TransformersTokenizer(folder, defaults=GenerationDefaults())


@pytest.fixture(scope="module")
def tiny() -> TransformersTokenizer:
    return TransformersTokenizer(bundled_folder(), defaults=GenerationDefaults(eos_token_id=(7, 8)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_of_tiny(tmp_path / "model")


@pytest.mark.parametrize(
    "text", ["", "It was a dark night.", "naïve 日本語 👍\n\ttabs", " spaces "]
)
def test_text_comes_back_from_its_tokens(tiny: TransformersTokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == text


def test_an_answer_ends_at_the_tokenizers_own_end_or_at_the_generation_configs(
    tiny: TransformersTokenizer,
) -> None:
    assert tiny.stop_tokens == {3, 7, 8}
    assert tiny.has_chat_template


def test_a_conversation_leads_up_to_the_assistants_turn(tiny: TransformersTokenizer) -> None:
    asked = tiny.encode_chat([{"role": "user", "content": "Hello"}])
    longer = tiny.encode_chat(
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Bye"},
        ]
    )
    assert longer[: len(asked)] == asked
    assert longer[-1] == asked[-1]
    assert "Hello" in tiny.decode(asked)
    assert set(asked) > {3}


@pytest.mark.parametrize("message", [{"role": "wizard", "content": "hi"}, {"content": "hi"}, {}])
def test_turns_that_the_template_does_not_know_are_refused(
    tiny: TransformersTokenizer, message: dict[str, str]
) -> None:
    with pytest.raises(RequestError, match="chat template refuses"):
        tiny.encode_chat([message])


def test_text_that_is_no_unicode_is_refused(tiny: TransformersTokenizer) -> None:
    """A command line's byte that is no UTF-8 reaches Python as a lone surrogate."""
    with pytest.raises(RequestError):
        tiny.encode("caf\udce9")
    with pytest.raises(RequestError):
        tiny.encode_chat([{"role": "user", "content": "caf\udce9"}])


def test_a_model_without_a_template_is_told_apart(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert not read(folder).has_chat_template


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{{ messages[9].role.x }}",
        "{{ 1 + 'a' }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_that_fails_is_an_error_of_ours(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(OomproofError):
        read(folder).encode_chat([{"role": "user", "content": "hi"}])


def test_a_template_cannot_reach_pythons_own_names(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(RequestError, match="chat template refuses"):
        read(folder).encode_chat([{"role": "user", "content": "hi"}])


def _tokenizer(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer.json", **fields)


def _settings(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer_config.json", **fields)


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "cut off": lambda folder: (folder / "tokenizer.json").write_bytes(
        (folder / "tokenizer.json").read_bytes()[:60_000]
    ),
    "no JSON": _write("tokenizer.json", "{ no"),
    "no text": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"),
    "empty": _write("tokenizer.json", "{}"),
    "a list": _write("tokenizer.json", "[]"),
    "without a model": _tokenizer(model=None),
    "of an unknown model": _tokenizer(model={"type": "Nope"}),
    "settings that are no JSON": _write("tokenizer_config.json", "{ no"),
    "settings that are a list": _write("tokenizer_config.json", "[]"),
    "a class that is a number": _settings(tokenizer_class=5),
    "special tokens that are a number": _settings(extra_special_tokens=7),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tokenizer_is_refused_with_the_folders_name(folder: Path, damage: str) -> None:
    DAMAGE[damage](folder)
    with pytest.raises(CheckpointError) as refused:
        read(folder)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_bundled_models_own_sampling_options_are_read() -> None:
    assert read_generation_defaults(bundled_folder()) == GenerationDefaults(
        eos_token_id=3, temperature=0.8, top_p=0.95
    )


def test_a_folder_without_a_generation_config_has_no_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()


def test_several_end_tokens_are_read_and_strange_fields_left_alone(tmp_path: Path) -> None:
    fields = {"eos_token_id": [3, 4], "top_k": 50, "num_beams": "many", "bad": {"x": [None]}}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert read_generation_defaults(tmp_path) == GenerationDefaults(eos_token_id=(3, 4), top_k=50)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{ no",
        "[]",
        "5",
        "[" * 100_000,
        '{"temperature": "hot"}',
        '{"temperature": -5}',
        '{"temperature": 1e999}',
        '{"temperature": NaN}',
        '{"top_k": 1.5}',
        '{"top_k": -1}',
        '{"top_p": 2}',
        '{"top_p": []}',
        '{"eos_token_id": "x"}',
        '{"eos_token_id": [[3]]}',
    ],
    ids=lambda text: text[:24],
)
def test_a_hostile_generation_config_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError) as refused:
        read_generation_defaults(tmp_path)
    assert refused.value.file == str(path)
    assert "\n" not in str(refused.value)


def test_a_generation_config_of_gigabytes_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    with path.open("wb") as file:
        file.truncate(40 * 2**20)
    with pytest.raises(CheckpointError, match="larger than"):
        read_generation_defaults(tmp_path)


def test_a_tokenizer_without_a_token_for_a_cannot_tell_what_begins_a_document(folder: Path) -> None:
    nothing = {"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": ""}
    edit_json(folder / "tokenizer.json", normalizer=nothing)
    with pytest.raises(RequestError, match="which tokens begin a document"):
        _ = read(folder).prefix
