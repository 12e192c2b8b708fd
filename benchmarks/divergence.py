"""What formats, searched scales and `fit` do to a small model's answers, against its 16 bits.

    python -m benchmarks.divergence MODEL_FOLDER TEXT_FILE [--tokens 8192] [--window 512]

One JSON line a choice: exact bytes of the linears, their relative squared error, the mean KL
divergence of the next token's distribution to the unquantized model's, and perplexity. Weights are
quantized, decoded and put back into transformers' model, computed in float32: the figures are the
formats' alone, not an engine's. For models of some hundred million parameters at most.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from oomproof.formats import FORMATS, SEARCHED_FORMATS
from oomproof.loading.weight_errors import measured_errors
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.models.resolve import resolve
from oomproof.models.spec import TensorSpec
from oomproof.planning.damage import FIT_FORMATS, groups_of, item_of
from oomproof.planning.fit import choose
from oomproof.quantization.handlers import handler

UNIFORM = ("nf4-dq", "int4", "nf4", "nf4-g16", "fp4", "fp8", "int8", "bf16")
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75)
"""Of what lies between nf4-dq and int8, that `fit` may spend."""


class Divergence:
    """A model, and what its answers lose.

    Args:
        folder: Of the model.
        text: Read in windows.
        tokens: Of the text, at most.
        window: Tokens of a row.
    """

    def __init__(self, folder: Path, text: str, tokens: int, window: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text)["input_ids"]
        rows = min(len(ids), tokens) // window
        self.spec = resolve(str(folder))
        self.groups = groups_of(self.spec, QUANTIZED_ROLES["native"])
        self._ids = torch.tensor(ids[: rows * window]).view(rows, window)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = dict(self._model.named_parameters())
        self._weights = {t.name: found[t.name] for g in self.groups.values() for t in g}
        self._exact = {name: w.detach().clone() for name, w in self._weights.items()}
        self._reference = self._log_probabilities()
        self._held: dict[tuple[str, str, bool], torch.Tensor] = {}

    @torch.inference_mode()
    def _log_probabilities(self) -> torch.Tensor:
        return torch.cat(
            [torch.log_softmax(self._model(row[None]).logits.float(), -1) for row in self._ids]
        )

    def _decoded(self, name: str, format_name: str, search: bool) -> torch.Tensor:
        key = (name, format_name, search)
        if key not in self._held:
            exact = self._exact[name]
            rows, columns = exact.shape
            held = handler(format_name, search=search)
            parts = held.encode(exact.to(torch.bfloat16))
            self._held[key] = held.decode(parts, (rows, columns), torch.float32)
        return self._held[key]

    @torch.inference_mode()
    def of(self, by_tensor: Mapping[str, str], *, search: bool) -> dict[str, float]:
        """The figures of a choice: tensor → format."""
        lost = norm = 0.0
        for name, weight in self._weights.items():
            decoded = self._decoded(name, by_tensor[name], search)
            lost += float((decoded - self._exact[name]).square().sum())
            norm += float(self._exact[name].square().sum())
            weight.data.copy_(decoded)
        found = self._log_probabilities()
        kl = (self._reference.exp() * (self._reference - found)).sum(-1).mean()
        surprise = -found[:, :-1].gather(-1, self._ids[:, 1:, None]).mean()
        return {
            "bytes": self.size_bytes(by_tensor),
            "relative_squared_error": float(f"{lost / norm:.6g}"),
            "kl": float(f"{float(kl):.6g}"),
            "perplexity": float(f"{math.exp(float(surprise)):.6g}"),
        }

    def size_bytes(self, by_tensor: Mapping[str, str]) -> int:
        """Of all linears."""
        return sum(
            stored_bytes(tensor, by_tensor[tensor.name])
            for group in self.groups.values()
            for tensor in group
        )

    def uniform(self, format_name: str) -> dict[str, str]:
        """One format for all."""
        return dict.fromkeys(self._weights, format_name)


def stored_bytes(tensor: TensorSpec, format_name: str) -> int:
    """Of one linear."""
    rows, columns = tensor.shape
    return FORMATS[format_name].stored_bytes(rows, columns)


def rows_of(model: Divergence, folder: Path) -> Iterator[dict[str, object]]:
    """The figures, one after the other."""
    for name in UNIFORM:
        for search in (False, True) if name in SEARCHED_FORMATS else (False,):
            yield {"format": name, "search": search, **model.of(model.uniform(name), search=search)}
    errors = measured_errors(folder, model.spec)
    formats = (*FIT_FORMATS, "bf16")
    items = [
        item_of(name, group, formats, errors, stored_bytes) for name, group in model.groups.items()
    ]
    low, high = (model.size_bytes(model.uniform(name)) for name in ("nf4-dq", "int8"))
    budgets = {name: model.size_bytes(model.uniform(name)) for name in ("nf4", "nf4-g16", "int8")}
    budgets |= {f"{share:.0%}": low + int(share * (high - low)) for share in SHARES}
    for label, budget in budgets.items():
        fit = choose(items, budget)
        if fit is None:
            continue
        by_tensor = {
            tensor.name: choice.format
            for group, choice in zip(model.groups.values(), fit.chosen, strict=True)
            for tensor in group
        }
        yield {
            "format": "fit",
            "search": True,
            "budget": label,
            "spare_used": round((fit.size_bytes - low) / max(1, budget - low), 4),
            **model.of(by_tensor, search=True),
            "groups": {
                name: sum(choice.format == name for choice in fit.chosen) for name in formats
            },
        }


def main() -> int:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    asked = parser.parse_args()
    text = asked.text.read_text(encoding="utf-8")
    model = Divergence(asked.folder, text, asked.tokens, asked.window)
    for row in rows_of(model, asked.folder):
        print(
            json.dumps({"benchmark": "divergence", "model": asked.folder.name, **row}), flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
