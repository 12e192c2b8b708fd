"""What `eval` found; plain values, to be printed, drawn or kept as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oomproof.evaluation.statistics import METHOD, Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionResult:
    """Tokens that have about as much of their window before them."""

    first: int
    """Position in the window, 0 for its first predicted token."""
    end: int
    tokens: int
    bits_per_token: Estimate
    kl: Estimate
    """Nats a token."""
    agreement: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerResult:
    """What a format does to a decoder layer."""

    layer: int
    weight_error: float
    """‖W − Ŵ‖ / ‖W‖ over the layer's quantized weights."""
    hidden_error: float
    """‖h − ĥ‖ / ‖h‖ of the hidden states that leave it, errors of earlier layers included."""
    linears: Mapping[str, float]
    """Linear → its weight error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatResult:
    """A format on this model and text."""

    format: str
    """As it was asked for: "nf4", "nf4-dq+search", "fit:40MiB"; of a folder its name."""
    tensors: Mapping[str, int]
    """Format → linears that are held in it, of a mixture; nothing of any other."""
    bits_per_weight: float
    """Stored bits of a quantized weight, scales included, as the plan counts them."""
    weight_bytes: int
    """Of the whole model, what the format leaves in 16 bits included."""
    perplexity: Estimate
    bits_per_byte: Estimate
    added_bits_per_byte: Estimate
    """Against the reference, of the same tokens."""
    kl: Estimate
    """D(reference ‖ format), nats a token."""
    agreement: Estimate
    """Share of tokens for which both find the same most likely."""
    positions: tuple[PositionResult, ...]
    layers: tuple[LayerResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": self.format,
            "tensors": dict(self.tensors),
            "bits_per_weight": self.bits_per_weight,
            "weight_bytes": self.weight_bytes,
            "perplexity": self.perplexity.as_dict(),
            "bits_per_byte": self.bits_per_byte.as_dict(),
            "added_bits_per_byte": self.added_bits_per_byte.as_dict(),
            "kl": self.kl.as_dict(),
            "agreement": self.agreement.as_dict(),
            "positions": [
                {
                    "first": part.first,
                    "end": part.end,
                    "tokens": part.tokens,
                    "bits_per_token": part.bits_per_token.as_dict(),
                    "kl": part.kl.as_dict(),
                    "agreement": part.agreement.as_dict(),
                }
                for part in self.positions
            ],
            "layers": [
                {
                    "layer": layer.layer,
                    "weight_error": layer.weight_error,
                    "hidden_error": layer.hidden_error,
                    "linears": dict(layer.linears),
                }
                for layer in self.layers
            ],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much more one format diverges than another, token by token."""

    format: str
    other: str
    kl: Estimate
    """Of `format` less that of `other`, nats a token: narrower than both their intervals, for the
    same tokens are hard for both."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": self.format, "other": self.other, "kl": self.kl.as_dict()}


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelsResult:
    """A format's levels beside the weights that they stand for."""

    format: str
    levels: tuple[float, ...]
    """Ascending, as shares of the block's largest magnitude."""
    error: float
    """Root mean square distance of a weight from its nearest level, by the histogram."""
    inner_error: float
    """The same of the half of all weights that is nearest to zero."""
    outer_error: float
    """And of the other half."""
    squared_errors: tuple[float, ...]
    """What each of ERROR_BINS equal parts of −1 to 1 adds to the square of `error`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Weights over the largest magnitude of their block of 64, of all quantized linears."""

    counts: tuple[int, ...]
    """Equal bins from −1 to 1."""
    middle: float
    """Half of all weights lie within ± this."""
    formats: tuple[LevelsResult, ...]
    """Those with few levels."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "counts": list(self.counts),
            "middle": self.middle,
            "levels": {one.format: list(one.levels) for one in self.formats},
            "errors": {
                one.format: {
                    "all": one.error,
                    "inner": one.inner_error,
                    "outer": one.outer_error,
                    "squared": list(one.squared_errors),
                }
                for one in self.formats
            },
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """Formats of a model against its 16 bits, on one text."""

    model: str
    text: str
    """Name of the file."""
    device: str
    compute_dtype: str
    context: int
    """Tokens of a window."""
    windows: int
    tokens: int
    """Tokens that were predicted."""
    text_bytes: int
    """UTF-8 bytes of these."""
    peak_bytes: int
    """Memory that was planned for it."""
    reference: FormatResult
    """The 16-bit model itself."""
    formats: tuple[FormatResult, ...]
    """In the order in which they were asked for."""
    differences: tuple[Difference, ...]
    """Of every two formats, the one that was asked for later first."""
    histogram: Histogram
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": 1,
            "model": self.model,
            "text": self.text,
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "context": self.context,
            "windows": self.windows,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "peak_bytes": self.peak_bytes,
            "intervals": METHOD,
            "reference": self.reference.as_dict(),
            "formats": [one.as_dict() for one in self.formats],
            "differences": [one.as_dict() for one in self.differences],
            "histogram": self.histogram.as_dict(),
            "seconds": self.seconds,
        }
