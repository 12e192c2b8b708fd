"""How a decoder computes, beyond what its tensors say: norms, rotary positions, multipliers.

The native engine has one decoder; families differ in these numbers and in which tensors they have
(biases, norms of queries and keys). A family that computes in a way these words cannot say has no
`Forward` and runs through transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oomproof.models.config import ConfigReader, shown

_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_EPS = 1e-6
_MAX_MULTIPLIER = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """What a family's config.json calls the numbers that its decoder computes with."""

    embedding_multiplier: str | None = None
    """Field of what embeddings are multiplied by; None for 1."""
    residual_multiplier: str | None = None
    """Field of what attention and MLP are multiplied by before they are added; None for 1."""
    attention_multiplier: str | None = None
    """Field of the scale of scores; None for 1 / sqrt(head dim)."""
    logits_divisor: str | None = None
    """Field of what logits are divided by; None for 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and how it is stretched."""

    theta: float
    """Base of the frequencies."""
    kind: str = "default"
    """"default", "linear" (positions divided), "llama3" (Llama 3.1's, by wavelength), or "yarn"
    (Peng et al. 2023, arXiv:2309.00071)."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    """YaRN: what rotated queries and keys are multiplied by; None for the paper's formula."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardSpec:
    """The numbers of one model."""

    rms_norm_eps: float
    rope: RopeSpec
    attention_scale: float
    """Of the scores."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0


ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def read_forward(
    reader: ConfigReader, forward: Forward | None, *, head_dim: int
) -> ForwardSpec | str:
    """The numbers of a model, or why the native decoder does not compute it.

    Raises:
        ConfigError: A field is of another type, or out of bounds.
    """
    if forward is None:
        return "the native engine has no decoder of this family yet"
    activation = reader.text("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        return f"the native engine computes silu, not {shown(activation)}"
    if head_dim % 2:
        return f"the native engine rotates the halves of a head, and {head_dim} has none"
    rope = _read_rope(reader)
    if isinstance(rope, str):
        return rope
    return ForwardSpec(
        rms_norm_eps=_positive(reader, "rms_norm_eps", _DEFAULT_EPS, most=1.0),
        rope=rope,
        attention_scale=_multiplier(reader, forward.attention_multiplier, head_dim**-0.5),
        embedding_multiplier=_multiplier(reader, forward.embedding_multiplier, 1.0),
        residual_multiplier=_multiplier(reader, forward.residual_multiplier, 1.0),
        logits_divisor=_multiplier(reader, forward.logits_divisor, 1.0),
    )


def _read_rope(reader: ConfigReader) -> RopeSpec | str:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

    Where a file has both, transformers goes by `rope_scaling`, and so does this.
    """
    scaling = _object(reader, "rope_scaling") or _object(reader, "rope_parameters")
    has_theta = scaling is not None and scaling.value("rope_theta") is not None
    theta = _positive(
        scaling if scaling is not None and has_theta else reader,
        "rope_theta",
        _DEFAULT_ROPE_THETA,
        more_than=1.0,
        most=1e12,
    )
    for holder in (scaling, reader):
        partial = None if holder is None else holder.number("partial_rotary_factor")
        if partial not in (None, 1):
            return f"the native engine rotates whole heads, not {partial:g} of them"
    if scaling is None:
        return RopeSpec(theta=theta)
    if any(isinstance(value, Mapping) for value in scaling.values.values()):
        return "the native engine rotates all layers alike, not each type of them in its own way"
    kind = scaling.text("rope_type") or scaling.text("type") or "default"
    if kind not in ROPE_KINDS:
        return f"the native engine has no {shown(kind)} rotary positions"
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "yarn" and (refusal := _why_not_yarn(scaling)) is not None:
        return refusal
    has_attention_factor = scaling.value("attention_factor") is not None
    return RopeSpec(
        theta=theta,
        kind=kind,
        factor=_required_factor(scaling),
        low_freq_factor=_positive(scaling, "low_freq_factor", 1.0, most=1e6),
        high_freq_factor=_positive(scaling, "high_freq_factor", 4.0, most=1e6),
        # transformers takes the one beside the other fields before the one among the parameters.
        original_max_position_embeddings=reader.integer("original_max_position_embeddings")
        or scaling.integer("original_max_position_embeddings")
        or reader.required("max_position_embeddings"),
        attention_factor=(
            _positive(scaling, "attention_factor", 1.0, most=_MAX_MULTIPLIER)
            if has_attention_factor
            else None
        ),
        beta_fast=_positive(scaling, "beta_fast", 32.0, most=1e6),
        beta_slow=_positive(scaling, "beta_slow", 1.0, most=1e6),
    )


def _why_not_yarn(scaling: ConfigReader) -> str | None:
    if scaling.value("mscale") is not None or scaling.value("mscale_all_dim") is not None:
        return "the native engine has no yarn rotary positions with mscale"
    if scaling.value("truncate") is not None and not scaling.boolean("truncate"):
        return "the native engine has no yarn rotary positions without truncation"
    return None


def _object(reader: ConfigReader, name: str) -> ConfigReader | None:
    """The reader of an object; None where there is none, or nothing in it."""
    value = reader.value(name)
    if value is None or value == {}:
        return None
    if not isinstance(value, Mapping):
        reader.fail(name, f"{shown(value)} is not an object")
    return reader.nested(name, defaults={})


def _required_factor(reader: ConfigReader) -> float:
    if reader.value("factor") is None:
        reader.fail("factor", "is missing")
    factor = _positive(reader, "factor", 1.0, most=1e6)
    if factor < 1:
        reader.fail("factor", f"{factor:g} is less than 1")
    return factor


def _positive(
    reader: ConfigReader, name: str, default: float, *, most: float, more_than: float = 0.0
) -> float:
    value = reader.number(name)
    if value is None:
        return default
    if not more_than < value <= most:
        reader.fail(name, f"{value:g} is not more than {more_than:g} and at most {most:g}")
    return float(value)


def _multiplier(reader: ConfigReader, name: str | None, default: float) -> float:
    return default if name is None else _positive(reader, name, default, most=_MAX_MULTIPLIER)
