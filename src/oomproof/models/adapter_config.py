"""Strict reading of peft's adapter_config.json: plain LoRA of linear layers, and nothing else.

A field that changes what an adapter computes is honoured exactly or refused; one that decides only
how it is trained is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from oomproof.errors import ConfigError
from oomproof.models.config import LIMITS, MAX_TEXT, ConfigReader, shown

MERGE = "merge it into its base model with peft (merge_and_unload) and give the merged folder"
"""What is left for adapters that are not computed here."""
MAX_ALPHA = 1e6
MAX_PATTERNS = 65_536

_MUST_BE_OFF = {
    # Field → what it asks for.
    "alora_invocation_tokens": "adapters that an invocation turns on",
    "arrow_config": "routing between adapters",
    "fan_in_fan_out": "transposed weights",
    "kasa_config": "KaSA",
    "layer_replication": "layers used several times",
    "lora_bias": "biases of B",
    "megatron_config": "Megatron's parallel layers",
    "modules_to_save": "whole modules beside the adapter",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "adapters of bare parameters",
    "trainable_token_indices": "retrained embeddings",
    "use_bdlora": "block-diagonal adapters",
    "use_dora": "weight-decomposed adapters",
    "use_qalora": "QA-LoRA's pooled inputs",
    "velora_config": "VeLoRA",
}
_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
_READ = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
_PLAIN_BEGINNINGS = ("gaussian", "orthogonal", "eva")
"""init_lora_weights that leave the base model's weights as they are; so do true and false."""
_OFF: tuple[object, ...] = (None, False, [], {})
_PATTERN = re.compile(r"(?:[\w\-|()\[\]^$.*+]|\\[.dw])+")
_NESTED = re.compile(r"\)[*+]|[*+][*+]")
_MOST_REPEATS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What an adapter_config.json says of an adapter's arithmetic, and of where it applies."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    """End of a module's name, as a regular expression → its rank instead of `r`."""
    alpha_pattern: Mapping[str, float]
    """The same for `lora_alpha`."""
    target_modules: tuple[str, ...] | None
    """Ends of modules' names; None where a regular expression says it."""
    exclude_modules: tuple[str, ...]
    layers_to_transform: frozenset[int] | None
    """None for all layers."""
    base_model: str | None

    def rank_of(self, module: str) -> int:
        """Of a module's adapter."""
        return self.rank_pattern.get(_key_of(module, self.rank_pattern), self.r)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by: lora_alpha / r, or / √r (rsLoRA, arXiv:2312.03732)."""
        alpha = self.alpha_pattern.get(_key_of(module, self.alpha_pattern), self.lora_alpha)
        rank = self.rank_of(module)
        return alpha / (sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str, layer: int) -> bool | None:
        """Whether a linear layer has an adapter; None where a regular expression says it.

        Such an expression is not run: it may be anything, and the tensors say what was adapted.
        """
        if self.target_modules is None:
            return None
        return (
            _ends_with(module, self.target_modules)
            and not _ends_with(module, self.exclude_modules)
            and (self.layers_to_transform is None or layer in self.layers_to_transform)
        )


def read_adapter_config(reader: ConfigReader) -> AdapterConfig:
    """What the file says.

    Raises:
        ConfigError: A field is of another type, out of bounds, or asks for more than plain LoRA.
    """
    _refuse_other_adapters(reader)
    targets, excluded = reader.value("target_modules"), reader.value("exclude_modules")
    names: tuple[str, ...] | None = None
    if not isinstance(targets, str) and not isinstance(excluded, str):
        names = reader.texts("target_modules")
        if not names:
            reader.fail("target_modules", "names no module")
    return AdapterConfig(
        r=reader.required("r"),
        lora_alpha=_alpha(reader, "lora_alpha"),
        use_rslora=reader.boolean("use_rslora"),
        rank_pattern=_rank_pattern(reader),
        alpha_pattern=_alpha_pattern(reader),
        target_modules=names,
        exclude_modules=() if isinstance(excluded, str) else reader.texts("exclude_modules"),
        layers_to_transform=_layers(reader),
        base_model=_base_model(reader),
    )


def _refuse_other_adapters(reader: ConfigReader) -> None:
    """Whatever is not plain LoRA of linear layers, field by field."""
    kind = reader.text("peft_type")
    if kind != "LORA":
        reader.fail("peft_type", f"{shown(kind)} is not 'LORA'", remedy=MERGE)
    task = reader.text("task_type")
    if task not in (None, "CAUSAL_LM"):
        reader.fail("task_type", f"{shown(task)} is not 'CAUSAL_LM'")
    for name, what in _MUST_BE_OFF.items():
        if (value := reader.value(name)) not in _OFF:
            reader.fail(name, f"{shown(value)} asks for {what}, which is not done", remedy=MERGE)
    bias = reader.text("bias")
    if bias not in (None, "none"):
        reader.fail("bias", f"{shown(bias)} is not 'none'", remedy=MERGE)
    begun = reader.value("init_lora_weights")
    if not (begun is None or isinstance(begun, bool) or begun in _PLAIN_BEGINNINGS):
        reader.fail(
            "init_lora_weights",
            f"{shown(begun)} changes the base model's weights, which stay as they are here",
            remedy="convert it with peft: path_initial_model_for_weight_conversion",
        )
    if (pattern := reader.value("layers_pattern")) not in (None, [], "", "layers", ["layers"]):
        reader.fail("layers_pattern", f"{shown(pattern)} is not 'layers'", remedy=MERGE)
    for name, value in reader.values.items():
        known = name in _READ or name in _NO_EFFECT or name in _MUST_BE_OFF
        if not known and value not in _OFF:
            problem = f"{shown(value)} is the value of a field that is not known here"
            reader.fail(name[:MAX_TEXT], problem, remedy=MERGE)


def _layers(reader: ConfigReader) -> frozenset[int] | None:
    value = reader.value("layers_to_transform")
    if value in (None, []):
        return None
    if not isinstance(value, list):
        reader = ConfigReader(values={"layers_to_transform": [value]}, file=reader.file)
    high = LIMITS["num_hidden_layers"][1] - 1
    return frozenset(reader.integers("layers_to_transform", low=0, high=high))


def _rank_pattern(reader: ConfigReader) -> Mapping[str, int]:
    def rank(key: str, value: object) -> int:
        own = ConfigReader(values={"r": value}, file=reader.file, prefix=f"rank_pattern.{key}.")
        return own.required("r")

    return {key: rank(key, value) for key, value in _patterns(reader, "rank_pattern").items()}


def _alpha_pattern(reader: ConfigReader) -> Mapping[str, float]:
    values = _patterns(reader, "alpha_pattern")
    own = ConfigReader(values=values, file=reader.file, prefix="alpha_pattern.")
    return {key: _alpha(own, key) for key in values}


def _alpha(reader: ConfigReader, name: str) -> float:
    alpha = reader.number(name)
    if alpha is None:
        reader.fail(name, "is missing")
    if abs(alpha) > MAX_ALPHA:
        reader.fail(name, f"{alpha:g} is not within ±{MAX_ALPHA:g}")
    return alpha


def _patterns(reader: ConfigReader, name: str) -> Mapping[str, object]:
    """The object of that name, whose keys are regular expressions that end in a bounded time."""
    if reader.value(name) in (None, {}):
        return {}
    values = reader.nested(name, defaults={}).values
    if len(values) > MAX_PATTERNS:
        reader.fail(name, f"has {len(values):,} entries, the bound is {MAX_PATTERNS:,}")
    for key in values:
        if not _is_harmless(key):
            reader.fail(
                name,
                f"{shown(key)} is not a module's name, or one with `.*` or `\\d+` at most twice",
                remedy="write the names of the modules",
            )
    return values


def _is_harmless(key: str) -> bool:
    repeats = key.count("*") + key.count("+")
    if len(key) > MAX_TEXT or repeats > _MOST_REPEATS or _NESTED.search(key):
        return False
    if not _PATTERN.fullmatch(key):
        return False
    try:
        re.compile(key)
    except re.error:
        return False
    return True


def _key_of(module: str, patterns: Mapping[str, object]) -> str:
    """The first pattern that the end of a module's name matches, as in peft; else the name."""
    found = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next(found, module)


def _ends_with(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _base_model(reader: ConfigReader) -> str | None:
    """Where it can be read: it decides nothing, and may be a path of any length."""
    try:
        return reader.text("base_model_name_or_path")
    except ConfigError:
        return None
