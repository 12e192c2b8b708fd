"""One pass over a log: the first failure, what stands around it, and how many follow."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.faults.fault import Cause
from oomproof.postmortem.scan import Spot, Stage, scan
from tests.faults.forms import Form, near_misses, read_forms
from tests.postmortem.logs import read

FORMS = [*read_forms("memory.toml"), *read_forms("failures.toml")]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_pasted_failure_gets_its_class_and_its_cause(form: Form) -> None:
    reading = read(form.text)
    assert reading.first is not None
    assert reading.first.fault_class.value == form.fault_class
    assert reading.first.cause.value == form.cause
    if form.cause != "device-assert":
        assert {cause.value: count for cause, count in reading.more.items()} == form.more
    if form.code is not None:
        assert reading.first.evidence.code == form.code


@pytest.mark.parametrize("text", near_misses())
def test_a_log_of_near_misses_has_no_failure(text: str) -> None:
    assert read(f"starting\n{text}\ndone").first is None


def test_the_first_cause_is_kept_and_the_rest_is_counted() -> None:
    oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    reading = read(
        f"Traceback (most recent call last):\n{oom}\n\nDuring handling of the above exception, "
        f"another exception occurred:\n\nTraceback (most recent call last):\n{oom}\n\n"
        "RuntimeError: CUDA error: unspecified launch failure\nRuntimeError: nothing known\n"
    )
    assert reading.first is not None
    assert reading.first.cause is Cause.GPU_MEMORY
    assert reading.more == {Cause.GPU_MEMORY: 1, Cause.LAUNCH_FAILURE: 1}
    assert reading.lines == 10


def test_the_last_error_that_nobody_knows_is_kept() -> None:
    reading = read("KeyError: 'a'\nsome words\nmyapp.OddError: it went wrong\n")
    assert reading.first is None
    assert reading.last_error == "myapp.OddError: it went wrong"


@pytest.mark.parametrize(
    ("lines", "stage", "spot"),
    [
        (["    model = AutoModel.from_pretrained('x')"], Stage.LOADING, Spot.UNKNOWN),
        (['  File "a.py", line 1, in load_weights'], Stage.LOADING, Spot.UNKNOWN),
        (["    out = model.generate(**inputs)"], Stage.GENERATING, Spot.UNKNOWN),
        (
            ['  File "a.py", line 1, in generate', "    loss.backward()"],
            Stage.TRAINING,
            Spot.UNKNOWN,
        ),
        (
            ["    model.generate(x)", '  File "/t/cache_utils.py", line 9, in update'],
            Stage.GENERATING,
            Spot.KV_CACHE,
        ),
        (["    attn_weights = torch.matmul(q, k)"], Stage.UNKNOWN, Spot.ATTENTION),
        (["    logits = self.lm_head(hidden_states)"], Stage.UNKNOWN, Spot.LOGITS),
    ],
)
def test_the_traceback_says_what_was_done(lines: list[str], stage: Stage, spot: Spot) -> None:
    whole = ["Traceback (most recent call last):", '  File "a.py", line 1', *lines]
    reading = scan([*whole, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB"])
    assert (reading.stage, reading.spot) == (stage, spot)


def test_an_older_traceback_does_not_speak_for_a_later_one() -> None:
    reading = read(
        'Traceback (most recent call last):\n  File "a.py", line 1, in load_weights\n'
        'KeyError: 1\nTraceback (most recent call last):\n  File "a.py", line 1, in generate\n'
        "torch.OutOfMemoryError: CUDA out of memory."
    )
    assert reading.stage is Stage.GENERATING


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('model = AutoModelForCausalLM.from_pretrained("org/a-7B")', "org/a-7B"),
        ("python -m vllm.entrypoints.openai.api_server --model org/b.1 --port 1", "org/b.1"),
        ("$ vllm serve org/c --max-model-len 4096", "org/c"),
        ("accelerate launch train.py --model_name_or_path=org/d", "org/d"),
        ('model_id = "org/e"', "org/e"),
        ("llm = LLM(model='org/f', tensor_parallel_size=2)", "org/f"),
        ("/root/.cache/huggingface/hub/models--org--g-7b/snapshots/abc/config.json", "org/g-7b"),
        ("https://huggingface.co/org/h/resolve/main/config.json", "org/h"),
        ("oomproof run org/i hello", "org/i"),
        ("--model /models/j/config.json", "/models/j"),
        ('from_pretrained("./k/")', "./k"),
    ],
)
def test_names_of_models_are_found(line: str, name: str) -> None:
    assert read(line).models[0] == name


@pytest.mark.parametrize(
    "line",
    ["the model is fine", "model: 7 layers", "--model", 'from_pretrained("")', "model = make()"],
)
def test_other_words_about_models_are_no_names(line: str) -> None:
    assert read(line).models == ()


def test_gpus_are_counted_from_the_index_the_command_and_the_environment() -> None:
    assert read("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB. GPU 3 has a "
                "total capacity of 8.00 GiB").num_gpus == 4  # fmt: skip
    assert read("vllm serve a/b --tensor-parallel-size 8").num_gpus == 8
    assert read("CUDA_VISIBLE_DEVICES=0,1,2 python a.py").num_gpus == 3
    assert read("nothing").num_gpus == 1


def test_memory_does_not_grow_with_the_log() -> None:
    def lines() -> Iterator[str]:
        for number in range(50_000):
            yield f"RuntimeError: CUDA error: unspecified launch failure {number}"
            yield f'model = "org/m{number}" on NVIDIA A{number}'

    reading = scan(lines())
    assert reading.lines == 100_000
    assert len(reading.models) <= 16
    assert len(reading.accelerators) <= 16
    assert reading.more == {Cause.LAUNCH_FAILURE: 49_999}


def test_a_log_of_json_is_read_where_it_keeps_its_errors() -> None:
    oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    traceback = f'Traceback (most recent call last):\n  File "a.py", line 1, in generate\n{oom}'
    reading = read(json.dumps({"level": "error", "exception": traceback}))
    assert reading.first is not None
    assert reading.first.figures.tried_bytes == 2 << 30
    assert reading.stage is Stage.GENERATING
    for record in ({"role": "user", "content": oom}, {"prompt": oom}, [oom], {"error": {"a": oom}}):
        assert read(json.dumps(record)).first is None
    assert read('{"error": ' + "[" * 10_000).first is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.text(max_size=200), st.sampled_from([f.text for f in FORMS] + near_misses())),
        max_size=20,
    )
)
def test_no_log_raises(lines: list[str]) -> None:
    read("\n".join(lines))
