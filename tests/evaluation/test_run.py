"""The walk: transformers' logits of the dequantized weights, wherever the states wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from oomproof.errors import CheckpointError, LoadError
from oomproof.evaluation.compare import AGREES, KL, NLL
from oomproof.evaluation.run import Found, Job, Walk
from oomproof.evaluation.variants import Variant, plain
from oomproof.evaluation.windows import Windows
from oomproof.formats import SEARCHED_FORMATS, DType, get_format, mixture
from oomproof.hardware.probe import probe
from oomproof.memory.profiles import engine_profile
from oomproof.models.resolve import bundled_folder, resolve, with_checkpoint
from oomproof.quantization.handlers import handler
from tests.compat.checkpoints import copy_of_tiny, edit_tensors, random_checkpoint

FORMATS = ("fp32", "int8", "int4", "nf4", "nf4-dq", "fp4", "fp4-dq")
FAMILIES = ("llama", "llama, tied", "granite", "qwen2, sliding", "qwen3")
CPU = torch.device("cpu")


def windows_of(vocab_size: int, context: int, count: int = 2, skipped: int = 1) -> Windows:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(4, vocab_size, (count, context + 1), generator=generator).tolist()
    return Windows(
        inputs=tuple(tuple(row[:-1]) for row in tokens),
        targets=tuple(tuple(row[skipped:]) for row in tokens),
        text_bytes=1,
    )


def job_of(folder: Path, windows: Windows, **changes: Any) -> Job:
    spec = with_checkpoint(resolve(str(folder)))
    hardware = probe()
    assert spec.forward is not None
    options: dict[str, Any] = {
        "variants": FORMATS,
        "compute_dtype": DType.FLOAT32,
        "states_on_device": True,
        **changes,
    }
    options["variants"] = tuple(
        plain(one) if isinstance(one, str) else one for one in options["variants"]
    )
    return Job(
        spec=spec,
        forward=spec.forward,
        folder=folder,
        windows=windows,
        device=CPU,
        profile=engine_profile("native", hardware.devices[0], hardware.host),
        **options,
    )


def figures_of_transformers(folder: Path, job: Job) -> torch.Tensor:
    """The same figures, from transformers' model with each format's weights in float32."""
    inputs, targets = torch.tensor(job.windows.inputs), torch.tensor(job.windows.targets)
    found = []
    reference = None
    names = [tensor.name for tensor in job.spec.tensors if tensor.layer is not None]
    for variant in job.variants:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        parameters = dict(model.named_parameters())
        with torch.inference_mode():
            for weight, name in ((parameters[name], name) for name in names):
                kind = variant.format.for_tensor(name).name
                if weight.dim() == 2 and kind not in ("bf16", "fp16", "fp32"):
                    codec = handler(kind, search=variant.search)
                    shape = (weight.shape[0], weight.shape[1])
                    decoded = codec.decode(codec.encode(weight), shape, torch.float32)
                    weight.data.copy_(decoded)
            logits = model(inputs).logits[:, -targets.shape[1] :].flatten(0, 1)
        here = torch.log_softmax(logits, dim=1)
        reference = here if reference is None else reference
        found.append(
            torch.stack(
                (
                    -here.gather(1, targets.flatten().unsqueeze(1)).squeeze(1),
                    (reference.exp() * (reference - here)).sum(dim=1),
                    (here.argmax(dim=1) == reference.argmax(dim=1)).float(),
                )
            )
        )
    return torch.stack(found)


def assert_alike(found: Found, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.figures[:, NLL], expected[:, NLL], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found.figures[:, KL], expected[:, KL], rtol=5e-3, atol=1e-5)
    assert (found.figures[:, AGREES] == expected[:, AGREES]).float().mean() > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_is_transformers_model_of_its_weights(tmp_path: Path, family: str) -> None:
    folder = random_checkpoint(tmp_path, family, std=0.05)
    job = job_of(folder, windows_of(2048, context=48, skipped=3))
    assert_alike(Walk(job).run(), figures_of_transformers(folder, job))


def test_the_bundled_model_is_too_also_over_several_chunks_of_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("oomproof.evaluation.run.LOGITS_BYTES", 7 * 2048 * 4)
    job = job_of(bundled_folder(), windows_of(2048, context=64), variants=("fp32", "nf4-dq"))
    assert_alike(Walk(job).run(), figures_of_transformers(bundled_folder(), job))


def test_searched_scales_and_mixtures_are_transformers_model_of_their_weights(
    tmp_path: Path,
) -> None:
    folder = random_checkpoint(tmp_path, std=0.05)
    linears = [t.name for t in resolve(str(folder)).tensors if t.layer and len(t.shape) == 2]
    mixed = mixture({n: ("int8", "nf4-g16", "fp32")[i % 3] for i, n in enumerate(linears)})
    variants = (
        "fp32",
        *(Variant(name=n, format=get_format(n), search=True) for n in SEARCHED_FORMATS),
        Variant(name="fit", format=mixed, search=True),
    )
    job = job_of(folder, windows_of(2048, context=48), variants=variants)
    assert_alike(Walk(job).run(), figures_of_transformers(folder, job))


def test_windows_of_several_chunks_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = windows_of(2048, context=96)
    job = job_of(bundled_folder(), windows, variants=("fp32", "int4"))
    whole = Walk(job).run()
    monkeypatch.setattr("oomproof.evaluation.decoder.chunk_tokens", lambda _context: 40)
    torch.testing.assert_close(Walk(job).run().figures, whole.figures, rtol=1e-3, atol=1e-3)


def test_where_the_states_wait_changes_nothing(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path)
    windows = windows_of(2048, context=32)
    here, there = (
        Walk(job_of(folder, windows, states_on_device=place)).run() for place in (True, False)
    )
    assert torch.equal(here.figures, there.figures)
    assert here.layers == there.layers


def test_weight_errors_are_those_of_quantizing_whole_weights() -> None:
    job = job_of(bundled_folder(), windows_of(2048, context=16), variants=("bf16", "nf4-dq", "fp8"))
    found = Walk(job).run()
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled_folder(), dtype="bfloat16")
    for variant, layers in zip(job.variants[1:], found.layers, strict=True):
        weight = model.model.layers[3].mlp.down_proj.weight.detach()
        codec = handler(variant.name)
        decoded = codec.decode(codec.encode(weight), tuple(weight.shape), torch.float32)
        expected = (decoded - weight).norm() / weight.float().norm()
        assert layers[3].linears["mlp.down_proj"] == pytest.approx(float(expected), rel=1e-4)
        assert layers[0].hidden_error < layers[-1].hidden_error


def test_the_histogram_counts_every_linear_once() -> None:
    job = job_of(bundled_folder(), windows_of(2048, context=16), variants=("bf16", "nf4", "int4"))
    linears = sum(t.numel for t in job.spec.tensors if t.layer is not None and len(t.shape) == 2)
    assert sum(Walk(job).run().histogram.result(("nf4",)).counts) == linears


def test_progress_ends_with_everything() -> None:
    told: list[tuple[int, int]] = []
    job = job_of(bundled_folder(), windows_of(2048, context=16), variants=("bf16", "nf4"))
    Walk(job, lambda done, total: told.append((done, total))).run()
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    folder = random_checkpoint(tmp_path, edit=damage)
    with pytest.raises(CheckpointError, match="up_proj"):
        Walk(job_of(folder, windows_of(2048, context=16))).run()


def test_a_tensor_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "tiny")
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(256)}))
    with pytest.raises(LoadError, match=f"1 unexpected parameters: {name}"):
        Walk(job_of(folder, windows_of(2048, 8))).run()
