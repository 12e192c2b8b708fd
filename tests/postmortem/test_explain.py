"""An explanation as a whole."""

from __future__ import annotations

import json

import pytest

from oomproof.errors import InputError
from oomproof.faults.fault import Cause, FaultClass
from oomproof.postmortem.scan import Stage
from oomproof.postmortem.words import CLASSES, WORDS
from tests.faults.forms import Form, read_forms
from tests.postmortem.logs import card, explained, oom

FORMS = [*read_forms("memory.toml"), *read_forms("failures.toml")]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_is_explained_with_what_to_do(form: Form) -> None:
    found = explained(form.text)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["fault"]["cause"] == form.cause
    assert plain["what"]
    assert plain["remedies"] or plain["commands"]


def test_every_cause_and_every_class_has_words() -> None:
    assert set(WORDS) == set(Cause)
    assert set(CLASSES) == set(FaultClass)
    for cause, words in WORDS.items():
        assert not words.what.endswith("."), cause
        assert words.plans or words.remedies or cause is Cause.BAD_REQUEST, cause


def test_an_explanation_says_all_of_it() -> None:
    before = 'model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B-Instruct")'
    found = explained(oom(card("15.70", "0.08", "15.48", "15.21", "0.04"), before=before) * 2)
    assert found.stage is Stage.UNKNOWN
    assert found.blame is not None
    assert found.blame.term.value == "weights"
    assert found.advice is not None
    assert found.more == {Cause.GPU_MEMORY: 1}
    plain = found.as_dict()
    assert plain["plan"]["fits"] is True
    assert plain["model"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert plain["more"] == {"gpu-memory": 1}


def test_a_failure_that_is_none_of_memory_is_not_planned() -> None:
    found = explained(
        "--model llama-3.1-8b\nRuntimeError: CUDA error: device-side assert triggered"
    )
    assert found.advice is None
    assert found.blame is None


def test_a_map_that_spills_is_blamed_on_no_bytes() -> None:
    found = explained(
        'from_pretrained("llama-3.1-8b")\nValueError: Some modules are dispatched on the CPU or '
        "the disk. Make sure"
    )
    assert found.blame is None
    assert found.advice is not None


def test_who_trains_is_told_what_the_plan_does_not_cover() -> None:
    words = card("15.70", "0.08", "15.48", "15.21", "0.04")
    found = explained(oom(words).replace("in <module>", "in training_step"))
    assert found.stage is Stage.TRAINING
    assert "gradients" in found.remedies[-1]


def test_nothing_known_is_said_with_the_last_error() -> None:
    with pytest.raises(InputError, match=r"is known in its 2 lines; its last error is .*KeyError"):
        explained("all is well\nKeyError: 'a'")
    with pytest.raises(InputError, match="is known in its 1 line"):
        explained("all is well")
