"""What every format, searched scales and `fit` lose on held-out text, and whether claims hold.

    python -m benchmarks.fidelity tiny FOLDER … --text test.txt [--calibration valid.txt]
    python -m benchmarks.fidelity tiny --train CORPUS --out results.jsonl

One JSON line a model and format, as `oomproof eval` measures it on the device with the most memory:
first in bfloat16, as the engine computes, then in float32, which leaves no rounding but the
formats' own. From the latter follow claims, a line each with the paired difference it rests on.
Budgets of `fit` lie between the bytes of two uniform formats; with a calibration text each is
filled once more by what errors cost there. `--train CORPUS` (a folder with train.txt, valid.txt
and test.txt) first trains the preset "small" of tools/train_tiny.py, 24 M parameters, and measures
it on test.txt, calibrated on valid.txt. Nothing is asserted: what does not hold is said.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import run
from typing import Any

import torch

import oomproof
from oomproof.evaluation.report import Difference, EvalReport, FormatResult
from oomproof.formats import DType, get_format
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.memory.weights import stored
from oomproof.models.resolve import resolve

UNIFORM = (
    "fp8",
    "int8",
    "nf4",
    "nf4-dq",
    "fp4",
    "fp4-dq",
    "int4",
    "nf4-g16",
    "nf4-dq+search",
    "nf4+search",
    "int4+search",
    "nf4-g16+search",
)
BUDGETS = (
    ("nf4-dq", "nf4", 0.75),
    ("nf4-g16", "int8", 0.1),
    ("nf4-g16", "int8", 0.25),
    ("nf4-g16", "int8", 0.5),
    ("nf4-g16", "int8", 0.75),
    ("int8", "bf16", 0.25),
)
"""(format, larger format, how far from the one to the other)."""
LEAST_SPARE = 0.95
"""Of what lies between the smallest uniform format and a budget, that `fit` is to spend."""
_SMALLEST = "nf4-dq"
_TRAIN_TINY = Path(__file__).parent.parent / "tools" / "train_tiny.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """What is measured on."""

    path: Path
    calibration: Path | None
    tokens: str
    context: str | None


def budgets_of(model: str) -> dict[str, int]:
    """Name of each mixture ("fit:BYTES") → bytes that the whole model may take."""
    spec, roles = resolve(model), QUANTIZED_ROLES["native"]

    def size_bytes(name: str) -> int:
        return sum(
            stored(tensor, get_format(name), DType.BFLOAT16, roles).stored_bytes
            for tensor in spec.tensors
        )

    sizes = [
        size_bytes(low) + int(share * (size_bytes(high) - size_bytes(low)))
        for low, high, share in BUDGETS
    ]
    return {f"fit:{size}": size for size in sizes}


def rows_of(model: str, text: Text) -> Iterator[dict[str, Any]]:
    """Figures, then claims."""
    budgets = budgets_of(model)
    for dtype in ("bfloat16", "float32"):
        report = _evaluate(model, text, budgets, dtype)
        for one in (report.reference, *report.formats):
            yield {**_head(report), **_figures(one)}
    for claim in claims_of(report, budgets):
        yield {**_head(report), **claim}
    if text.calibration is None:
        return
    calibrated = _evaluate(model, text, budgets, "float32", text.calibration)
    head = {**_head(calibrated), "calibration": text.calibration.name}
    for one in calibrated.formats:
        if one.format in budgets:
            yield {**head, **_figures(one)}
    free = {one.format: one.kl.value for one in report.formats}
    for claim in claims_of(calibrated, budgets, free):
        yield {**head, **claim}


def claims_of(
    report: EvalReport, budgets: Mapping[str, int], free: Mapping[str, float] | None = None
) -> Iterator[dict[str, Any]]:
    """What ought to hold, and whether it does.

    Args:
        report: Of uniform formats and mixtures.
        budgets: Mixture → bytes that it may take.
        free: The divergence of the same mixtures without a calibration; then it is compared.
    """
    found = {one.format: one for one in report.formats}
    pairs = {(one.format, one.other): one for one in report.differences}
    uniform = [one for one in report.formats if one.format not in budgets]
    if free is None:
        for name, one in found.items():
            plain, _, searched = name.partition("+")
            if searched and plain in found:
                yield {
                    "claim": f"{name} diverges less than {plain}",
                    **_less(one, found[plain], pairs),
                }
    for name, budget in budgets.items():
        fit = found[name]
        best = min(
            (one for one in uniform if one.weight_bytes <= fit.weight_bytes),
            key=lambda one: one.kl.value,
        )
        yield {
            "claim": f"{name} diverges less than every uniform format of at most its bytes",
            "uniform": best.format,
            **_less(fit, best, pairs),
        }
        least = found[_SMALLEST].weight_bytes
        used = (fit.weight_bytes - least) / (budget - least)
        yield {
            "claim": f"{name} spends at least {LEAST_SPARE:.0%} of the spare bytes",
            "holds": used >= LEAST_SPARE,
            "spent": round(used, 4),
        }
        if free is not None:
            yield {
                "claim": f"{name} diverges no more calibrated than without",
                "holds": fit.kl.value <= free[name],
                "kl": fit.kl.value,
                "kl_without": free[name],
            }


def train(corpus: Path, out: Path, steps: int | None, device: str) -> None:
    """The preset of 24 M parameters, on a corpus."""
    texts = [part for name in ("train", "valid", "test") for part in (f"--{name}", corpus / name)]
    arguments = [f"{one}.txt" if isinstance(one, Path) else one for one in texts]
    command = [sys.executable, str(_TRAIN_TINY), *arguments, "--out", str(out)]
    command += ["--preset", "small", "--device", device]
    command += [] if steps is None else ["--steps", str(steps)]
    run(command, check=True, stdout=sys.stderr)


def main() -> int:
    """Prints the rows, and writes them where it is asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--train", type=Path, metavar="CORPUS")
    parser.add_argument("--steps", type=int, help="of training, instead of the preset's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", default="32k")
    parser.add_argument("--context", help="tokens of a window")
    parser.add_argument("--keep", type=Path, help="folder for the trained model")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    corpus: Path | None = asked.train
    path = asked.text or (corpus / "test.txt" if corpus else None)
    calibration = asked.calibration or (corpus / "valid.txt" if corpus else None)
    models: list[str] = list(asked.models)
    if path is None or not (models or corpus):
        parser.error("name models and --text, or --train")
    text = Text(path=path, calibration=calibration, tokens=asked.tokens, context=asked.context)
    with ExitStack() as stack:
        if corpus is not None:
            folder: Path = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            models.append(str(folder / "small"))
            folder.mkdir(parents=True, exist_ok=True)
            train(corpus, folder / "small", asked.steps, asked.device)
        out = stack.enter_context(asked.out.open("w")) if asked.out else None
        for model in models:
            for row in rows_of(model, text):
                line = json.dumps(row)
                print(line, flush=True)
                if out is not None:
                    out.write(line + "\n")
                    out.flush()
    return 0


def _evaluate(
    model: str,
    text: Text,
    budgets: Iterable[str],
    compute_dtype: str,
    calibration: Path | None = None,
) -> EvalReport:
    names = [name for name in UNIFORM if _runs(name, compute_dtype)]
    return oomproof.evaluate(
        model,
        text.path,
        formats=[*names, *budgets],
        tokens=text.tokens,
        context=text.context,
        compute_dtype=compute_dtype,
        calibration=calibration,
    )


def _runs(name: str, compute_dtype: str) -> bool:
    """Whether a format runs on the GPU here, or on the processor where there is none."""
    least = get_format(name.partition("+")[0]).min_compute_capability
    if least is None or not torch.cuda.is_available():
        return True
    # There, fp8 rounds its inputs, and takes them in 16 bits.
    return compute_dtype != "float32" and torch.cuda.get_device_capability() >= least


def _head(report: EvalReport) -> dict[str, Any]:
    return {
        "benchmark": "fidelity",
        "model": Path(report.model).name,
        "device": report.device,
        "oomproof": oomproof.__version__,
        "torch": torch.__version__,
        "text": report.text,
        "tokens": report.tokens,
        "context": report.context,
        "compute_dtype": report.compute_dtype,
    }


def _figures(one: FormatResult) -> dict[str, Any]:
    return {
        "format": one.format,
        "bits_per_weight": round(one.bits_per_weight, 4),
        "weight_bytes": one.weight_bytes,
        "perplexity": round(one.perplexity.value, 4),
        "bits_per_byte": round(one.bits_per_byte.value, 5),
        "kl": float(f"{one.kl.value:.5g}"),
        "kl_low": float(f"{one.kl.low:.5g}"),
        "kl_high": float(f"{one.kl.high:.5g}"),
        "same_top": round(one.agreement.value, 4),
        "tensors": dict(one.tensors),
    }


def _less(
    one: FormatResult, other: FormatResult, pairs: Mapping[tuple[str, str], Difference]
) -> dict[str, Any]:
    """The paired difference, which is below zero where the claim holds."""
    found = pairs.get((one.format, other.format))
    sign = 1.0
    if found is None:
        found, sign = pairs[other.format, one.format], -1.0
    low, high = sorted((sign * found.kl.low, sign * found.kl.high))
    return {
        "holds": one.kl.value < other.kl.value,
        "difference": float(f"{sign * found.kl.value:.4g}"),
        "difference_low": float(f"{low:.4g}"),
        "difference_high": float(f"{high:.4g}"),
    }


if __name__ == "__main__":
    sys.exit(main())
