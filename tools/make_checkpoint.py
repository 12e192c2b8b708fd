"""Write a random checkpoint at true shapes, for tests and benchmarks.

    python tools/make_checkpoint.py --like llama-3.1-8b --layers 4 OUT

makes a Hugging Face folder that loads like the model it is named after: its config.json, bfloat16
safetensors in shards, and the bundled model's tokenizer (so that text goes in and out, without
meaning). Weights are drawn from N(0, 0.02²), norms are one; the same seed gives the same bytes on
the same kind of device. Only models whose files carry transformers' own tensor names can be made:
no mixtures of experts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from oomproof.errors import InputError, OomproofError
from oomproof.models.architectures import build_spec
from oomproof.models.catalog import find, suggest
from oomproof.models.resolve import bundled_folder
from oomproof.models.spec import ModelSource, ModelSpec, Role, TensorSpec
from oomproof.units import format_bytes, parse_bytes

STANDARD_DEVIATION = 0.02
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_checkpoint(
    like: str,
    out: Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    shard_bytes: int = 4 * 10**9,
    device: str = "cpu",
    overrides: dict[str, object] | None = None,
) -> ModelSpec:
    """Writes the folder and returns what it holds.

    Args:
        like: A name of the catalog.
        out: Folder to write; created where it is missing.
        layers: Number of decoder layers, None for all.
        seed: Of the random weights.
        shard_bytes: Most bytes of weights in one file.
        device: Where the numbers are drawn: "cuda" is faster.
        overrides: Further fields of config.json to change.

    Raises:
        InputError: No such model, or one whose files have other names than its parameters.
    """
    entry = find(like)
    if entry is None:
        close = suggest(like)
        raise InputError(
            f"{like!r} is not in the catalog",
            remedy=f"did you mean {' or '.join(close)}?" if close else "see docs/3-models.md",
        )
    config = {**entry.config, **(overrides or {})}
    if layers is not None:
        config["num_hidden_layers"] = layers
        config.pop("layer_types", None)
    spec = build_spec(
        config, id=like, source=ModelSource(kind="folder", path=str(out)), file="config.json"
    )
    if spec.num_experts or spec.extra_modules:
        raise InputError(f"{like}: only plain decoders can be made")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_weights(spec, out, shard_bytes=shard_bytes, seed=seed, device=device)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(bundled_folder() / name, out / name)
    return spec


def _write_weights(spec: ModelSpec, out: Path, *, shard_bytes: int, seed: int, device: str) -> None:
    generator = torch.Generator(device=device).manual_seed(seed)
    shards = list(_shards(spec, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {tensor.name: _random(tensor, generator).cpu() for tensor in tensors}
        save_file(values, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, name)
    total = spec.num_parameters * torch.bfloat16.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(spec: ModelSpec, shard_bytes: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    size = 0
    for tensor in spec.tensors:
        tensor_bytes = tensor.numel * torch.bfloat16.itemsize
        if shard and size + tensor_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor_bytes
    yield shard


def _random(tensor: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    values = torch.empty(tensor.shape, dtype=torch.bfloat16, device=generator.device)
    if tensor.role is Role.NORM:
        return values.fill_(1.0)
    return values.normal_(std=STANDARD_DEVIATION, generator=generator)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--like", required=True, help="a name of the catalog: llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="decoder layers, default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", default="4GB")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    try:
        spec = make_checkpoint(
            arguments.like,
            arguments.out,
            layers=arguments.layers,
            seed=arguments.seed,
            shard_bytes=parse_bytes(arguments.shard_size, what="shard-size"),
            device=arguments.device,
        )
    except OomproofError as error:
        sys.exit(f"error: {error}")
    size = format_bytes(spec.num_parameters * 2)
    print(f"{arguments.out}: {spec.num_parameters:,} parameters, {size}")


if __name__ == "__main__":
    main()
