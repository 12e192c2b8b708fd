"""Print contract or rehearsal results as the tables of docs/measured.md.

python benchmarks/table.py benchmarks/results/rehearsals-*.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TERMS = ("cuda_context", "weights", "kv_cache", "workspace", "staging")
MIB = 1024**2


def rows(path: Path) -> list[list[str]]:
    """A row a device of each result, predicted / measured in MiB."""
    table = []
    for line in path.read_text().splitlines():
        result = json.loads(line)
        if "devices" not in result:
            table.append([result["case"], "failed", *[""] * 8])
            continue
        requests = "" if result["concurrency"] == 1 else f" × {result['concurrency']}"
        for device in result["devices"]:
            cells = [
                f"{device['predicted'][term] / MIB:,.0f} / {device['measured'][term] / MIB:,.0f}"
                for term in TERMS
            ]
            promised, found = device["predicted_peak_bytes"], device["measured_peak_bytes"]
            table.append(
                [
                    result["model"].removeprefix("llama-"),
                    result["format"],
                    f"{result['context']:,}{requests}",
                    f"GPU {device['index']}",
                    *cells,
                    f"{promised / MIB:,.0f} / {found / MIB:,.0f} ({found / promised:.1%})",
                ]
            )
    return table


def main() -> None:
    """Prints the table of every file given."""
    head = ["model", "format", "context", "device", *TERMS, "peak without margin"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for name in sys.argv[1:]:
        for row in rows(Path(name)):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
