"""The output's small files: config.json, the index, and what is copied as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence

from oomproof.conversion.layout import Output, OutputShard
from oomproof.conversion.sources import Source
from oomproof.formats import DType
from oomproof.models.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from oomproof.models.headers import parse_json_object

BLOCK_SCALES = "oomproof_block_scales"
"""What in a quantization_config says how scales were chosen: "searched" or "absmax"."""


def small_files(source: Source, output: Output) -> dict[str, bytes]:
    """Every file of the output but shards and manifest, by name."""
    found = dict(source.side_files)
    found[CONFIG_FILE] = _config(source.config, output)
    if [shard.file for shard in output.shards] != [SINGLE_FILE]:
        found[INDEX_FILE] = _index(output.shards)
    return found


def plain_files(source: Source, shards: Sequence[OutputShard], dtype: DType) -> dict[str, bytes]:
    """The same for a checkpoint that is not quantized."""
    found = dict(source.side_files)
    config = parse_json_object(source.config, what="content", location=CONFIG_FILE)
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    found[CONFIG_FILE] = (json.dumps({**config, name: dtype.value}, indent=2) + "\n").encode()
    if [shard.file for shard in shards] != [SINGLE_FILE]:
        found[INDEX_FILE] = _index(shards)
    return found


def _config(raw: bytes, output: Output) -> bytes:
    """config.json with what transformers writes there for a bitsandbytes model."""
    config = parse_json_object(raw, what="content", location=CONFIG_FILE)
    config.pop("quantization_config", None)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = output.dtype.value
    if "torch_dtype" in config:
        config.pop("dtype", None)
    config["quantization_config"] = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": output.dtype.value,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": output.format.quant_type,
        "bnb_4bit_use_double_quant": output.format.double_quantized,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
        # Not a field of theirs, and ignored by transformers: codes and scales mean the same.
        BLOCK_SCALES: output.block_scales,
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def _index(shards: Sequence[OutputShard]) -> bytes:
    places = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.size_bytes for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
