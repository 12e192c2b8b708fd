"""Prints the native engine's rows of a rehearsals file as the tables of docs/measured.md.

python benchmarks/tables.py results/rehearsals-native-h200.jsonl [--speed]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_MIB = 2**20
_TERMS = ("cuda_context", "weights", "kv_cache", "workspace", "graphs", "staging")
_FAMILY = "llama-"


def memory_table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Predicted / measured MiB of each term, a line a device."""
    lines = [
        f"| model | format | cap | context | GPU | {' | '.join(_TERMS)} | peak without margin |",
        "|---" * (6 + len(_TERMS)) + "|",
    ]
    for row in rows:
        for device in row["devices"]:
            terms = [
                _pair(device["predicted"][term], device["measured"].get(term, 0)) for term in _TERMS
            ]
            predicted, measured = device["predicted_peak_bytes"], device["measured_peak_bytes"]
            peak = f"{_pair(predicted, measured)} ({measured / predicted:.1%})"
            cap = row["cap"] or ", ".join(row["max_memory"])
            cells = [*_names(row), cap, _context(row), str(device["index"]), *terms, peak]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def speed_table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Tokens a second that the same rows reached."""
    lines = [
        "| model | format | context | decode, short | decode, full | four together | prompt |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        alone = [rung for rung in row["rungs"] if rung["requests"] == 1]
        together = [rung for rung in row["rungs"] if rung["requests"] > 1]
        cells = [
            *_names(row),
            f"{row['context']:,}",
            f"{alone[0]['tokens_per_second']:.0f}",
            f"{alone[-1]['tokens_per_second']:.0f}",
            f"{together[-1]['tokens_per_second']:,.0f}" if together else "–",
            f"{alone[-1]['prefill_tokens_per_second']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _names(row: Mapping[str, Any]) -> list[str]:
    return [row["model"].removeprefix(_FAMILY), row["format"]]


def _context(row: Mapping[str, Any]) -> str:
    requests = "" if row["concurrency"] == 1 else f" × {row['concurrency']}"
    return f"{row['context']:,}{requests}"


def _pair(predicted: float, measured: float) -> str:
    return f"{predicted / _MIB:,.0f} / {measured / _MIB:,.0f}"


def main() -> None:
    """Reads the file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--speed", action="store_true", help="tokens a second, not memory")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.file.read_text().splitlines()]
    table = speed_table if options.speed else memory_table
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
