"""Where the parameters of a block lie in its memory: offsets, before there is any memory.

On a GPU the codes of 4-bit weights lie in tiles (quantization/tiles.py), and those of a projection
are one stream: q, k and v one after the other, tiles of gate and up in turn; so are their scales.
A component that is shared so begins where any other would, at a multiple of ALIGNMENT_BYTES, and
takes the bytes that the plan counts. Where one of them is no multiple of that, nothing but a gap
could align the next, and each linear is a stream of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oomproof.formats import DType, held_format
from oomproof.memory.arena import ALIGNMENT_BYTES
from oomproof.memory.weights import StoredTensor
from oomproof.models.spec import Role, TensorSpec
from oomproof.quantization.handlers import handler
from oomproof.quantization.tiled_writer import TILED_COMPONENTS, tiles_weight, tiling_bytes
from oomproof.quantization.tiles import TILE_ROWS
from oomproof.units import round_up

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_PLAIN = {DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16", DType.FLOAT32: "fp32"}

Held = tuple[TensorSpec, StoredTensor]
"""A parameter, and what is held of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Where the tiles of a weight are in a stream that others may share."""

    first_tile: int
    tile_stride: int
    """From one of its tiles to the next."""
    tiles: int
    """Of the whole stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A parameter and where its tensors lie, in bytes from the beginning of its block."""

    spec: TensorSpec
    held: StoredTensor
    format: str
    """Of its weight: the plan's format, or the compute dtype's where it is not quantized."""
    offsets: tuple[int, ...]
    """One for each of held.components: where its first tile is, of what is in tiles."""
    tiling: Tiling | None
    """None where it is row-major."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[rows, columns]."""
        rows, columns = self.spec.shape
        return rows, columns

    @property
    def workspace_numel(self) -> int:
        """float32 elements that quantizing it takes beside its place."""
        if not self.held.quantized:
            return 0
        own = handler(self.format).workspace_numel(self.matrix_shape)
        if self.tiling is None:
            return own
        return own + tiling_bytes(held_format(self.format), self.matrix_shape) // 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Parameters that lie together: a layer, or the embedding, or norm and head."""

    placed: tuple[Placed, ...]
    size_bytes: int


def name_in_layer(spec: TensorSpec) -> str:
    """A parameter's name without its layer's; "" outside of layers."""
    return spec.name.partition(".layers.")[2].partition(".")[2]


def lay_out_block(tensors: Iterable[Held], format_name: str, *, tiled: bool = False) -> Block:
    """Weights one after the other, then what is small: neighbours can be multiplied as one.

    Args:
        tensors: Those of the block, in the model's order.
        format_name: Of what does not name its own.
        tiled: Whether 4-bit weights lie in tiles, as far as they can.
    """
    linears: list[Held] = []
    others: list[Held] = []
    for held in tensors:
        (linears if held[0].role is Role.LINEAR else others).append(held)
    placed: list[Placed] = []
    offset = 0
    for members in (*_streams(linears, format_name, tiled=tiled), *([held] for held in others)):
        found, offset = _lay_out(members, format_name, offset, tiled=tiled)
        placed += found
    return Block(placed=tuple(placed), size_bytes=offset)


def _streams(linears: Sequence[Held], format_name: str, *, tiled: bool) -> list[list[Held]]:
    """The linears, those together that will be one stream."""
    by_name = {name_in_layer(held[0]): held for held in linears}
    streams = {}
    for names in (QKV, GATE_UP) if tiled else ():
        members = [by_name[name] for name in _weights_of(names) if name in by_name]
        if len(members) == len(names) and _can_share(members, format_name, names is GATE_UP):
            streams[_weights_of(names)] = members
    shared = {name for names in streams for name in names}
    first = {names[0]: members for names, members in streams.items()}
    return [
        first.get(name, [held])
        for held in linears
        if (name := name_in_layer(held[0])) in first or name not in shared
    ]


def _weights_of(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name}.weight" for name in names)


def _format_of(held: Held, format_name: str) -> str:
    return held[1].format or format_name


def _can_share(members: Sequence[Held], format_name: str, in_turn: bool) -> bool:
    shapes = {spec.shape for spec, _ in members}
    return (
        all(_is_tiled(held, format_name) for held in members)
        and len({_format_of(held, format_name) for held in members}) == 1
        and len({shape[1] for shape in shapes}) == 1
        and (len(shapes) == 1 or not in_turn)
        and all(
            component.size_bytes % ALIGNMENT_BYTES == 0
            for _, held in members
            for component in held.components
            if component.name in TILED_COMPONENTS
        )
    )


def _is_tiled(held: Held, format_name: str) -> bool:
    spec, stored = held
    return (
        stored.quantized
        and len(spec.shape) == 2
        and tiles_weight(
            held_format(_format_of(held, format_name)),
            (spec.shape[0], spec.shape[1]),
            stored.components,
        )
    )


def _lay_out(
    members: Sequence[Held], format_name: str, offset: int, *, tiled: bool
) -> tuple[list[Placed], int]:
    """(parameters, end) of one stream, or of one parameter: each component of all, then the next.

    Their tiles take turns where they are gate and up.
    """
    tiled = tiled and _is_tiled(members[0], format_name)
    tiles = [spec.shape[0] // TILE_ROWS if tiled else 1 for spec, _ in members]
    in_turn = name_in_layer(members[0][0]) == _weights_of(GATE_UP)[0]
    stride = len(members) if in_turn else 1
    offsets: list[list[int]] = [[] for _ in members]
    for index, component in enumerate(members[0][1].components):
        takes_turns = in_turn and component.name in TILED_COMPONENTS
        start = offset
        for number, (_, held) in enumerate(members):
            size = held.components[index].size_bytes
            turn = start + number * (size // tiles[number])
            offsets[number].append(turn if takes_turns else offset)
            offset += round_up(size, ALIGNMENT_BYTES)
    placed = []
    for number, (spec, held) in enumerate(members):
        tiling = Tiling(
            first_tile=number if in_turn else sum(tiles[:number]),
            tile_stride=stride,
            tiles=sum(tiles),
        )
        placed.append(
            Placed(
                spec=spec,
                held=held,
                format=held.format or format_name if held.quantized else _PLAIN[held.dtype],
                offsets=tuple(offsets[number]),
                tiling=tiling if tiled else None,
            )
        )
    return placed, offset
