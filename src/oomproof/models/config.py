"""Strict reading of a foreign config.json.

A config.json comes from whoever published the model. Here, and nowhere else, it is bounded and
typed: the file's size, its nesting, and every field that decides a tensor's shape. What is wrong
becomes one ConfigError that names file, field, value and bound; what passes is trusted from then
on. Fields that decide no shape are not looked at.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from oomproof.errors import ConfigError
from oomproof.formats import DType
from oomproof.units import MIB, format_bytes

MAX_CONFIG_BYTES = 4 * MIB
MAX_DEPTH = 64
"""Levels of objects and lists inside each other; real files have four."""
MAX_TEXT = 200
"""Characters of a name."""
MAX_EXPERTS = 262_144
"""Experts over all layers; the largest published models have about 25,000."""

LIMITS: Mapping[str, tuple[int, int]] = {
    "num_hidden_layers": (1, 1024),
    "hidden_size": (1, 131_072),
    "intermediate_size": (1, 1_048_576),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (1, 1024),
    "vocab_size": (1, 2_000_000),
    "max_position_embeddings": (1, 100_000_000),
    "original_max_position_embeddings": (1, 100_000_000),
    "sliding_window": (0, 100_000_000),
    "sliding_window_pattern": (1, 1024),
    "max_window_layers": (0, 1024),
    "num_experts": (0, 4096),
    "num_experts_per_tok": (0, 4096),
    "moe_intermediate_size": (1, 1_048_576),
    "shared_expert_intermediate_size": (1, 1_048_576),
    "decoder_sparse_step": (1, 1024),
    "q_lora_rank": (1, 131_072),
    "kv_lora_rank": (1, 131_072),
    "qk_nope_head_dim": (1, 1024),
    "qk_rope_head_dim": (1, 1024),
    "v_head_dim": (1, 1024),
    "n_shared_experts": (1, 64),
    "first_k_dense_replace": (0, 1024),
    "bits": (1, 16),
    "num_bits": (1, 16),
    "group_size": (-1, 65_536),
    "num_channels": (1, 64),
    "image_size": (1, 16_384),
    "patch_size": (1, 1024),
    "r": (1, 8192),
}
"""Smallest and largest value of each whole-number field."""

ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("n_inner", "ffn_hidden_size"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "max_position_embeddings": ("n_positions", "max_sequence_length"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_token",),
    "dtype": ("torch_dtype",),
    "bits": ("w_bit",),
    "group_size": ("q_group_size",),
}
"""Other names that files use for a field; two names with different values are refused."""


def read_config(data: bytes, *, file: str) -> Mapping[str, object]:
    """Parses a config.json, without trusting it.

    Args:
        data: The file's bytes.
        file: Its path or URL, for errors.

    Raises:
        ConfigError: Too large, not UTF-8, not JSON, nested too deeply, a key twice, a number that
            is not finite, or something other than an object.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(
            file, f"has {format_bytes(len(data))}, the bound is {format_bytes(MAX_CONFIG_BYTES)}"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(file, f"is not UTF-8 text: {error.reason} at {error.start}") from None
    _check_depth(text, file=file)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise ConfigError(file, "occurs twice", field=twice[:MAX_TEXT])
        return found

    def finite(literal: str) -> float:
        number = float(literal)
        if number in (float("inf"), float("-inf")):
            not_a_number(literal)
        return number

    def not_a_number(literal: str) -> NoReturn:
        raise ConfigError(file, f"{literal[:20]} is not a finite number")

    try:
        parsed = json.loads(
            text, object_pairs_hook=unique, parse_constant=not_a_number, parse_float=finite
        )
    except ValueError as error:
        raise ConfigError(file, f"is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(file, f"holds a {type(parsed).__name__}, not an object")
    return parsed


_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A JSON string, possibly cut off at the end of the text; linear in its length."""
_BRACKETS = re.compile(r"[\[\]{}]")


def _check_depth(text: str, *, file: str) -> None:
    """Refuses deep nesting before the recursive parser sees it."""
    depth = 0
    for bracket in _BRACKETS.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise ConfigError(file, f"is nested more than {MAX_DEPTH} levels deep")


def shown(value: object) -> str:
    """A foreign value for an error message: short, on one line, without control characters."""
    shortener = reprlib.Repr()
    shortener.maxstring = 80
    return shortener.repr(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigReader:
    """Typed and bounded access to the fields of one config.json."""

    values: Mapping[str, object]
    file: str
    prefix: str = ""
    """What comes before a field's name in errors: "text_config." inside that object."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Values of fields that the file may leave out. A field that is null has no value."""

    def value(self, name: str) -> object | None:
        """The field under whichever of its names the file uses, unchecked.

        Raises:
            ConfigError: Two of its names have different values.
        """
        present = [n for n in (name, *ALIASES.get(name, ())) if n in self.values]
        if not present:
            return self.defaults.get(name)
        first, *others = sorted(present, key=lambda n: self.values[n] is None)
        for other in others:
            if self.values[other] is not None and self.values[other] != self.values[first]:
                self.fail(other, f"{shown(self.values[other])} contradicts {first!r}")
        return self.values[first]

    def fail(self, name: str, problem: str, *, remedy: str | None = None) -> NoReturn:
        """Raises a ConfigError about a field."""
        raise ConfigError(self.file, problem, field=self.prefix + name, remedy=remedy)

    def integer(self, name: str) -> int | None:
        """A whole number within its bounds in LIMITS; None where there is none."""
        value = self.value(name)
        return None if value is None else self._bounded(name, value, *LIMITS[name])

    def required(self, name: str) -> int:
        """As `integer`, but there must be one."""
        value = self.integer(name)
        if value is None:
            names = " or ".join(repr(n) for n in ALIASES.get(name, ()))
            self.fail(name, "is missing" + (f" (also read as {names})" if names else ""))
        return value

    def integers(self, name: str, *, low: int, high: int) -> tuple[int, ...]:
        """A list of whole numbers; empty where there is none."""
        return tuple(self._bounded(name, item, low, high) for item in self._list(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of names; empty where there is none."""
        return tuple(self._text(name, item) for item in self._list(name))

    def text(self, name: str) -> str | None:
        """A name."""
        value = self.value(name)
        return None if value is None else self._text(name, value)

    def boolean(self, name: str) -> bool:
        """True or false; false where there is none."""
        value = self.value(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            self.fail(name, f"{shown(value)} is not true or false")
        return value

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(name, f"{shown(value)} is not a number")
        try:
            return float(value)
        except OverflowError:
            self.fail(name, f"{shown(value)} is too large a number")

    def nested(self, name: str, *, defaults: Mapping[str, object]) -> ConfigReader:
        """The reader of an object inside this one.

        Raises:
            ConfigError: There is no object of that name.
        """
        value = self.value(name)
        if value is None:
            self.fail(name, "is missing")
        if not isinstance(value, dict):
            self.fail(name, f"{shown(value)} is not an object")
        return ConfigReader(
            values=value, file=self.file, prefix=f"{self.prefix}{name}.", defaults=defaults
        )

    def _bounded(self, name: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(name, f"{shown(value)} is not a whole number")
        if not low <= value <= high:
            self.fail(name, f"{shown(value)} is not within {low:,} and {high:,}")
        return value

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
            self.fail(name, f"{shown(value)} is not a name of 1 to {MAX_TEXT} characters")
        return value

    def _list(self, name: str) -> list[object]:
        value = self.value(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self.fail(name, f"{shown(value)} is not a list")
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """What a config.json says about a decoder's shapes, each fact under one name."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    attention_bias: bool
    attention_out_bias: bool
    qkv_bias: bool
    mlp_bias: bool
    use_bias: bool
    use_qk_norm: bool
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int | None
    """Width of one expert; None where it is intermediate_size, or there are no experts."""
    shared_expert_intermediate_size: int | None
    decoder_sparse_step: int
    """Every n-th layer is a mixture of experts."""
    mlp_only_layers: frozenset[int]
    """Layers that are dense in spite of decoder_sparse_step."""
    sliding_window: int | None
    """Tokens; None where no layer slides."""
    use_sliding_window: bool
    max_window_layers: int
    sliding_window_pattern: int | None
    """Every n-th layer sees everything, the others slide."""
    layer_types: tuple[str, ...]
    """"full_attention" or "sliding_attention" for each layer; empty where the family decides."""
    attn_logit_softcapping: float | None
    kv_lora_rank: int | None
    """Width of the latent that keys and values are kept as; None without latent attention."""
    q_lora_rank: int | None
    """Width of the queries' latent; None where they are projected at once."""
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_shared_experts: int
    """Experts that every token passes through, each of moe_intermediate_size."""

    @property
    def has_full_queries(self) -> bool:
        """Whether queries are projected at once, in latent attention."""
        return self.q_lora_rank is None


def read_decoder(reader: ConfigReader) -> DecoderConfig:
    """Reads and checks the fields of a decoder.

    Raises:
        ConfigError: A field is missing, of another type, out of bounds, or contradicts another.
    """
    num_hidden_layers = reader.required("num_hidden_layers")
    num_attention_heads = reader.required("num_attention_heads")
    hidden_size = reader.required("hidden_size")
    return DecoderConfig(
        hidden_size=hidden_size,
        intermediate_size=reader.required("intermediate_size"),
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=_key_value_heads(reader, num_attention_heads),
        head_dim=_head_dim(reader, hidden_size, num_attention_heads),
        vocab_size=reader.required("vocab_size"),
        max_position_embeddings=reader.required("max_position_embeddings"),
        attention_bias=reader.boolean("attention_bias"),
        attention_out_bias=reader.boolean("attention_out_bias"),
        qkv_bias=reader.boolean("qkv_bias"),
        mlp_bias=reader.boolean("mlp_bias"),
        use_bias=reader.boolean("use_bias"),
        use_qk_norm=reader.boolean("use_qk_norm"),
        num_experts=_experts(reader, num_hidden_layers),
        num_experts_per_tok=reader.integer("num_experts_per_tok") or 0,
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        shared_expert_intermediate_size=reader.integer("shared_expert_intermediate_size"),
        decoder_sparse_step=reader.integer("decoder_sparse_step") or 1,
        mlp_only_layers=frozenset(
            (
                *reader.integers("mlp_only_layers", low=0, high=1023),
                *range(reader.integer("first_k_dense_replace") or 0),
            )
        ),
        sliding_window=reader.integer("sliding_window") or None,
        use_sliding_window=reader.boolean("use_sliding_window"),
        max_window_layers=reader.integer("max_window_layers") or 0,
        sliding_window_pattern=reader.integer("sliding_window_pattern"),
        layer_types=_layer_types(reader, num_hidden_layers),
        attn_logit_softcapping=reader.number("attn_logit_softcapping"),
        kv_lora_rank=reader.integer("kv_lora_rank"),
        q_lora_rank=_q_lora_rank(reader),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim") or 0,
        qk_rope_head_dim=reader.integer("qk_rope_head_dim") or 0,
        v_head_dim=reader.integer("v_head_dim") or 0,
        n_shared_experts=reader.integer("n_shared_experts") or 0,
    )


def _q_lora_rank(reader: ConfigReader) -> int | None:
    """As the file has it: null says that there is none, silence leaves the family's default."""
    if "q_lora_rank" in reader.values and reader.values["q_lora_rank"] is None:
        return None
    return reader.integer("q_lora_rank")


def _key_value_heads(reader: ConfigReader, num_attention_heads: int) -> int:
    heads = reader.integer("num_key_value_heads") or num_attention_heads
    if num_attention_heads % heads:
        reader.fail(
            "num_key_value_heads",
            f"{heads} does not divide num_attention_heads {num_attention_heads}",
        )
    return heads


def _head_dim(reader: ConfigReader, hidden_size: int, num_attention_heads: int) -> int:
    head_dim = reader.integer("head_dim")
    if head_dim is None:
        head_dim, rest = divmod(hidden_size, num_attention_heads)
        if rest or not head_dim:
            reader.fail(
                "num_attention_heads",
                f"{num_attention_heads} does not divide hidden_size {hidden_size}, "
                "and there is no head_dim",
            )
    return head_dim


def _experts(reader: ConfigReader, num_hidden_layers: int) -> int:
    experts = reader.integer("num_experts") or 0
    if experts * num_hidden_layers > MAX_EXPERTS:
        reader.fail(
            "num_experts",
            f"{experts} in each of {num_hidden_layers} layers is more than {MAX_EXPERTS:,}",
        )
    chosen = reader.integer("num_experts_per_tok") or 0
    if experts and not 1 <= chosen <= experts:
        reader.fail("num_experts_per_tok", f"{chosen} is not within 1 and {experts} experts")
    return experts


def _layer_types(reader: ConfigReader, num_hidden_layers: int) -> tuple[str, ...]:
    types = reader.texts("layer_types")
    if types and len(types) != num_hidden_layers:
        reader.fail("layer_types", f"has {len(types)} entries for {num_hidden_layers} layers")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            reader.fail("layer_types", f"{shown(name)} attention is not supported")
    return types


def read_dtype(reader: ConfigReader) -> DType:
    """Element type of the published weights; float32 where the file is silent, as transformers.

    Raises:
        ConfigError: Not an element type.
    """
    name = reader.text("dtype")
    if name is None:
        return DType.FLOAT32
    known = {dtype.value: dtype for dtype in DType if "float" in dtype}
    dtype = known.get(name.removeprefix("torch."))
    if dtype is None:
        reader.fail("dtype", f"{shown(name)} is not one of {', '.join(known)}")
    return dtype
