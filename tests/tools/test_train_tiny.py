"""The training script of the bundled model, on a few kB of text and a micro preset."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "tools" / "train_tiny.py"


def _load_script() -> Any:
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


train_tiny = _load_script()
MICRO = dataclasses.replace(train_tiny.PRESETS["micro"], steps=3)


def _book(seed: int, count: int) -> str:
    """Paragraphs of invented sentences, seeded."""
    rng = random.Random(seed)
    words = [
        "".join(rng.choice("aeioubcdfghlmnprst") for _ in range(rng.randint(2, 9)))
        for _ in range(200)
    ]

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + rng.choice(".?!")

    return "\n\n".join(" ".join(sentence() for _ in range(rng.randint(1, 5))) for _ in range(count))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of one run of three steps, and what the run measured."""
    folder = tmp_path_factory.mktemp("tiny")
    corpora = []
    for name, seed, count in (("train.txt", 0, 200), ("valid.txt", 1, 8), ("test.txt", 2, 8)):
        (folder / name).write_bytes(_book(seed, count).encode())
        corpora.append(train_tiny.Corpus.read(folder / name))
    measured = train_tiny.run(
        corpora=corpora,
        out=folder / "out",
        name="micro",
        preset=MICRO,
        seed=0,
        device=torch.device("cpu"),
        chat_answers=2,
    )
    return folder / "out", measured


@pytest.fixture(scope="module")
def model(trained: tuple[Path, Any]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(trained[0], dtype="auto").eval()


@pytest.fixture(scope="module")
def tokenizer(trained: tuple[Path, Any]) -> Any:
    return transformers.AutoTokenizer.from_pretrained(trained[0])


def test_the_folder_loads_as_a_bfloat16_llama_with_a_head_of_its_own(
    trained: tuple[Path, Any], model: Any
) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    config = json.loads((trained[0] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == MICRO.max_position_embeddings


def test_generation_ends_at_the_end_of_a_turn(model: Any, tokenizer: Any) -> None:
    assert tokenizer.eos_token == tokenizer.pad_token == train_tiny.END
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.do_sample


def test_training_lowers_the_loss_and_the_card_states_what_was_measured(
    trained: tuple[Path, Any],
) -> None:
    folder, measured = trained
    losses = [look.train_loss for look in measured.history]
    assert losses[-1] < losses[0]
    record = json.loads((folder / "training.json").read_text())
    assert record["measured"]["test_bits_per_byte"] == measured.test_bits_per_byte
    assert record["made_with"]["torch"] == torch.__version__
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{measured.test_bits_per_byte:.4f}" in card
    assert record["corpus"][0]["sha256"] in card
    assert str(folder.parent) not in card + json.dumps(record)


def test_the_chat_template_renders_what_the_model_was_trained_on(tokenizer: Any) -> None:
    turns = [("  Who goes there?", "A friend.\n"), ("Stand!", "I stand.")]
    messages = [{"role": "system", "content": "A castle. "}]
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == train_tiny.render_chat("A castle. ", turns)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    assert prompt == "<|bos|>A castle.<|user|>Who goes there?<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == tokenizer(rendered, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("role", ["tool", "system"])
def test_the_chat_template_refuses_a_role_it_was_not_trained_on(tokenizer: Any, role: str) -> None:
    messages = [{"role": "user", "content": "Hail."}, {"role": role, "content": "?"}]
    with pytest.raises(Exception, match=f"not '{role}'"):
        tokenizer.apply_chat_template(messages, tokenize=False)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_every_text_comes_back_from_the_tokenizer_unchanged(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *ids]


def test_a_tokenizer_trained_again_is_the_same(tokenizer: Any) -> None:
    again = train_tiny.train_tokenizer(_book(0, 200), MICRO.vocab_size, 128)
    assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(("window", "stride"), [(128, 64), (32, 16), (32, 32), (30, 7)])
def test_bits_per_byte_equals_one_token_at_a_time(
    model: Any, tokenizer: Any, window: int, stride: int
) -> None:
    text = _book(3, 3)[:200]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    size = len(text.encode())
    exact = copy.deepcopy(model).float()
    found = train_tiny.bits_per_byte(exact, ids, size, window=window, stride=stride, rows=3)

    sequence = [tokenizer.bos_token_id, *ids]
    width = min(window, len(ids))
    starts = [*range(0, len(ids) - width, stride), len(ids) - width]
    bits = 0.0
    for target in range(1, len(sequence)):
        start = next(s for s in starts if target <= s + width)
        with torch.no_grad():
            logits = exact(torch.tensor([sequence[start:target]])).logits[0, -1]
        bits -= torch.log_softmax(logits, -1)[sequence[target]].item() / math.log(2)
        seen = target - start
        assert seen >= min(target, width - stride)
    assert found == pytest.approx(bits / size, rel=1e-4)


def test_rows_depend_on_the_seed_alone_and_hold_chat_and_passage_starts(tokenizer: Any) -> None:
    text = _book(0, 200)

    def batch(seed: int) -> Any:
        rows = train_tiny.Rows(tokenizer, text, preset=MICRO, seed=seed, device=torch.device("cpu"))
        rows.next(8, 64)
        return rows.next(8, 128)

    first = batch(1)
    assert first.shape == (8, 129)
    assert torch.equal(first, batch(1))
    assert not torch.equal(first, batch(2))
    user = tokenizer.convert_tokens_to_ids(train_tiny.USER)
    is_chat = (first == user).any(1)
    assert int(is_chat.sum()) == round(8 * MICRO.chat_fraction)
    assert (first[is_chat, 0] == tokenizer.bos_token_id).all()


def test_chat_documents_are_passages_of_the_text() -> None:
    text = _book(4, 60)
    documents = train_tiny.ChatWriter(text, random.Random(0)).documents()
    assert len(documents) >= 10
    flat = "".join(text.split())
    for document in documents:
        assert document.startswith(train_tiny.BOS)
        assert document.endswith(train_tiny.END)
        for token in train_tiny.SPECIAL_TOKENS:
            document = document.replace(token, "")  # noqa: PLW2901
        assert "".join(document.split()) in flat


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 64, 32), (2, 32, 64), (1, 64, 64)):
        values = torch.linalg.svdvals(train_tiny.orthogonalise(torch.randn(shape)).float())
        assert values.max() < 1.4
        assert values.median() > 0.6


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [train_tiny.learning_rate_factor(s, 100, 0.1) for s in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == 0.0
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("tiny", 3_700_000, 3_900_000), ("small", 20_000_000, 25_000_000)]
)
def test_a_preset_has_the_size_it_is_for(name: str, low: int, high: int) -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(train_tiny.llama_config(train_tiny.PRESETS[name]))
    assert low <= sum(p.numel() for p in model.parameters()) <= high
    for parameter in model.parameters():
        if parameter.ndim == 2:
            assert all(size % 64 == 0 for size in parameter.shape)


def test_a_setting_that_is_no_field_is_refused() -> None:
    changed = train_tiny.changed(MICRO, ["muon_lr=0.5", "steps=7"])
    assert (changed.muon_lr, changed.steps) == (0.5, 7)
    with pytest.raises(ValueError, match="no field 'lr'"):
        train_tiny.changed(MICRO, ["lr=0.5"])


def test_a_corpus_that_holds_a_special_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("He said <|end|> to them.")
    with pytest.raises(ValueError, match=r"bad\.txt holds"):
        train_tiny.Corpus.read(tmp_path / "bad.txt")
