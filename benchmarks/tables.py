"""Prints results as the tables of docs/measured.md, or puts them there.

    python benchmarks/tables.py results/rehearsals-native-h200.jsonl [--speed]
    python benchmarks/tables.py results/products-h200.jsonl --into docs/measured.md
    python benchmarks/tables.py results/decode-h200.jsonl --into docs/measured.md

Of a rehearsals file those are the native engine's rows; of the two others, what products.py and
decode.py wrote. `--into` replaces what stands between the lines `<!-- products -->` and
`<!-- end of products -->`, or with decode in their place.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_MIB = 2**20
_TERMS = ("cuda_context", "weights", "kv_cache", "workspace", "graphs", "staging")
_FAMILY = "llama-"
Table = Callable[[Sequence[Mapping[str, Any]]], list[str]]


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


def products_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Products alone: a line a shape, µs and TB/s of ours and bitsandbytes' for each M."""
    tokens = sorted({row["tokens"] for row in rows})
    shapes: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        shapes.setdefault((row["model"], row["name"]), {})[row["tokens"]] = row
    lines = [
        f"| product | rows × columns | {' | '.join(f'M = {each}' for each in tokens)} |",
        "|---" * (2 + len(tokens)) + "|",
    ]
    for (model, name), found in shapes.items():
        first = next(iter(found.values()))
        size = f"{sum(first['rows']):,} × {first['columns']:,}"
        cells = [_product(found[each]) if each in found else "–" for each in tokens]
        lines.append(f"| {model.removeprefix(_FAMILY)} {name} | {size} | {' | '.join(cells)} |")
    return lines


def _product(row: Mapping[str, Any]) -> str:
    speeds = {name: f"{us:.1f} ({row['tb_per_s'][name]:.2f})" for name, us in row["us"].items()}
    peers = [name for name in row["us"] if name != "ours"]
    if not peers:
        return speeds["ours"]
    best = min(peers, key=row["us"].__getitem__)
    return f"{speeds['ours']} / {speeds[best]}"


def decode_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whole models: tokens a second of ours and transformers', the latest run of each row."""
    head = ["model", "format", "requests × prompt", "what", "oomproof", "of the limit"]
    head += ["transformers", "ratio", "first token, ms"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    latest = {row["row"]: row for row in rows}
    for row in latest.values():
        gpus = f" over {row['gpus']} GPUs" if row["gpus"] > 1 else ""
        adapter = f", adapter of rank {row['rank']}" if row.get("rank") else ""
        size = f"{row['requests']} × {row['prompt_tokens']:,}"
        what = "prompt" if row["new_tokens"] == 1 else "decode"
        cells = [row["model"].removeprefix(_FAMILY) + gpus + adapter, row["format"], size, what]
        if "ours" not in row:
            cells += ["failed", *["–"] * 4]
        else:
            sides = [row[side] for side in ("ours", "theirs") if side in row]
            speeds = [_speed(side["tokens_per_second"]) for side in sides]
            cells += [speeds[0], f"{row['share']:.0%}"]
            cells += [speeds[1], f"{row['ratio']:.1f}"] if len(sides) > 1 else ["not run", "–"]
            cells.append(" / ".join(f"{side['first_token_s'] * 1e3:.0f}" for side in sides))
        lines.append(f"| {' | '.join(cells)} |")
    return lines + _own_formats(latest)


def _own_formats(latest: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Our prompt in 4 bits beside our own in 16."""
    rows = [latest.get(name, {}) for name in ("8b-prompt", "8b-prompt-bf16")]
    if not all("ours" in row for row in rows):
        return []
    quantized, plain = (row["ours"]["tokens_per_second"] for row in rows)
    return ["", f"Our own prompt in nf4-dq runs at {quantized / plain:.0%} of our own in bf16."]


def measured_with(rows: Sequence[Mapping[str, Any]]) -> str:
    """Device, date and versions; all of them, where the rows of a table do not share them."""
    found: dict[str, None] = {}
    for row in rows:
        known = [f"{name} {version}" for name, version in row["versions"].items() if version]
        found[f"{row['device']}, {row['date']}, {', '.join(known)}"] = None
    return "; ".join(found) + "."


def place(text: str, name: str, lines: Sequence[str]) -> str:
    """The document with a table between its marks.

    Raises:
        ValueError: It has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"the document has no lines {begin.strip()} and {end}")
    return "".join([before, begin, *(f"{line}\n" for line in lines), end, after])


def _names(row: Mapping[str, Any]) -> list[str]:
    return [row["model"].removeprefix(_FAMILY), row["format"]]


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 1000 else 1}f}"


def _context(row: Mapping[str, Any]) -> str:
    requests = "" if row["concurrency"] == 1 else f" × {row['concurrency']}"
    return f"{row['context']:,}{requests}"


def _pair(predicted: float, measured: float) -> str:
    return f"{predicted / _MIB:,.0f} / {measured / _MIB:,.0f}"


TABLES: dict[str, Table] = {"products": products_table, "decode": decode_table}
"""By the `benchmark` of a file's rows."""


def main() -> None:
    """Reads the file and prints or places its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--speed", action="store_true", help="tokens a second, not memory")
    parser.add_argument("--into", type=Path, help="put the table into this document")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.file.read_text().splitlines()]
    if not rows:
        sys.exit(f"error: {options.file} has no results")
    name = rows[0]["benchmark"]
    if name not in TABLES:
        print("\n".join((speed_table if options.speed else memory_table)(rows)))
        return
    lines = [measured_with(rows), "", *TABLES[name](rows)]
    if options.into is None:
        print("\n".join(lines))
        return
    options.into.write_text(place(options.into.read_text(), name, lines))


if __name__ == "__main__":
    main()
