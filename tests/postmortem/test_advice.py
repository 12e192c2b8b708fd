"""The command that would have worked."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from oomproof.models.resolve import bundled_folder
from oomproof.postmortem.advice import Advice, advise
from tests.postmortem.logs import card, oom, read


def advised(text: str) -> Advice:
    return advise(read(text))


CARD = card("15.70", "0.08", "15.48", "15.21", "0.04")


def test_the_best_format_that_fits_that_gpu_is_planned() -> None:
    advice = advised(oom(CARD, before="python a.py --model meta-llama/Llama-3.1-8B-Instruct"))
    assert advice.gpus == "15.70GiB"
    plan = advice.plan
    assert plan is not None
    assert plan.fits
    assert plan.format == "int8"
    assert plan.devices[0].usable_bytes <= 15.70 * 2**30
    assert shlex.split(advice.commands[0])[:6] == [
        *("oomproof", "run", "meta-llama/Llama-3.1-8B-Instruct", "PROMPT", "--format", "int8")
    ]


def test_a_gpu_is_known_by_its_name_where_the_log_has_it() -> None:
    smi = (
        "|   0  NVIDIA GeForce RTX 3090        Off | 00000000:01:00.0 Off |                  N/A |"
    )
    words = card("23.69", "0.08", "23.48", "23.21", "0.04")
    assert advised(oom(words, before=smi)).gpus == "RTX 3090"
    # The message's memory decides: the name may be another GPU's.
    assert advised(oom(CARD, before=smi)).gpus == "15.70GiB"


def test_a_gpu_without_a_message_of_its_memory_is_known_by_its_name_alone() -> None:
    text = "Device: NVIDIA A100-SXM4-80GB\ntorch.AcceleratorError: CUDA error: out of memory"
    advice = advised(f"vllm serve llama-3.1-70b\n{text}")
    assert advice.gpus == "A100-80GB"
    assert advice.plan is not None


def test_what_others_held_is_not_planned_with_and_the_whole_gpu_beside_it() -> None:
    others = "Process 7 has 12.00 GiB memory in use. "
    words = card("23.64", "0.01", "11.20", "10.70", "0.02", before=others)
    advice = advised(oom(words, before="vllm serve meta-llama/Llama-3.1-8B-Instruct"))
    assert advice.gpus == "11.64GiB"
    assert advice.others_bytes == 12 << 30
    assert advice.plan is not None
    assert advice.alone is not None
    assert advice.plan.devices[0].peak_bytes <= 11.64 * 2**30
    assert advice.alone.format == "bf16"
    assert advice.plan.format in advice.commands[0]


def test_where_only_the_whole_gpu_is_enough_its_command_is_given() -> None:
    others = "Process 7 has 12.00 GiB memory in use. "
    words = card("23.64", "0.01", "11.20", "10.70", "0.02", before=others)
    advice = advised(oom(words, before="vllm serve Qwen/Qwen2.5-32B-Instruct"))
    assert advice.plan is not None
    assert not advice.plan.fits
    assert "--format nf4 " in advice.commands[0]


def test_as_many_gpus_are_planned_as_the_log_speaks_of() -> None:
    advice = advised(
        oom(CARD.replace("GPU 0", "GPU 3"), before="--model meta-llama/Llama-3.1-70B-Instruct")
    )
    assert advice.gpus == "4x15.70GiB"
    assert advice.plan is not None
    assert len(advice.plan.devices) == 4


def test_what_fits_in_no_format_asks_what_it_would_take() -> None:
    advice = advised(oom(CARD, before='from_pretrained("meta-llama/Llama-3.1-405B-Instruct")'))
    assert advice.plan is not None
    assert not advice.plan.fits
    assert advice.commands[0].endswith("--what-would-it-take")


def test_a_shorter_context_is_planned_where_the_usual_one_does_not_fit() -> None:
    words = card("5.80", "0.08", "5.48", "5.21", "0.04")
    advice = advised(oom(words, before="--model meta-llama/Llama-2-7b-hf"))
    assert advice.plan is not None
    assert advice.plan.fits
    assert f"--context {advice.plan.context}" in advice.commands[0]
    assert advice.plan.context < 4096


def test_a_model_that_is_not_known_here_is_named_in_the_command() -> None:
    advice = advised(oom(CARD, before="--model nobody/nothing-7B"))
    assert (advice.model, advice.plan) == ("nobody/nothing-7B", None)
    assert advice.commands == ('oomproof plan nobody/nothing-7B --gpus "15.70GiB"',)


def test_one_of_several_names_that_is_known_goes_first() -> None:
    names = '--model my/finetune\nbase_model = "mistralai/Mistral-7B-v0.1"'
    assert advised(oom(CARD, before=names)).model == "mistralai/Mistral-7B-v0.1"


def test_without_a_model_or_a_gpu_the_command_has_words_in_their_places() -> None:
    assert advised("torch.AcceleratorError: CUDA error: out of memory").commands == (
        'oomproof plan MODEL --gpus "YOUR GPUS"',
    )


def test_a_local_folder_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my model"
    folder.symlink_to(bundled_folder(), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").symlink_to(folder, target_is_directory=True)
    advice = advised(oom(CARD, before="--model ./m"))
    assert advice.plan is not None
    assert advice.plan.fits


def test_a_folder_that_is_no_model_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    advice = advised(oom(CARD, before=f"--model {tmp_path}"))
    assert advice.plan is None
    assert str(tmp_path) in advice.commands[0]


def test_names_are_quoted_for_the_shell() -> None:
    advice = advised(oom(CARD, before="--model ~/a-b"))
    assert shlex.split(advice.commands[0])[2] == "~/a-b"


def test_amds_stack_is_planned_for_transformers() -> None:
    text = oom(CARD, before="--model meta-llama/Llama-3.1-8B-Instruct").replace("CUDA", "HIP")
    advice = advised(text)
    assert advice.plan is not None
    assert advice.plan.engine == "transformers"
    assert "--engine transformers" in advice.commands[0]


def test_a_mac_is_sent_to_mlx() -> None:
    text = (
        "RuntimeError: MPS backend out of memory (MPS allocated: 5.56 GB, other allocations: 1.10 "
        "GB, max allowed: 6.80 GB). Tried to allocate 768.00 MB on private pool."
    )
    assert advised(text).commands == ('oomproof plan MODEL --for mlx --gpus "YOUR MAC"',)


def test_a_total_that_no_gpu_has_is_not_planned_with() -> None:
    assert advised(oom(CARD.replace("15.70", "0.01"))).gpus is None
