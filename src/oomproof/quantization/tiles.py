"""The tiled order of 4-bit weights: the order in which a matrix product on a GPU reads them.

A permutation of the bytes that the formats store, and nothing else. A tile is 16 rows. Within it
codes lie in fragments of 64 columns, 512 bytes each: lane 4g + t of a warp finds in its 16 bytes
the columns 16t … 16t + 15 of rows g and g + 8, byte by byte in turn. Scales lie in groups of 8
blocks of 64 columns, a last one of KB % 8: for each g, pairs of blocks of row g and of row g + 8 in
turn. Tiles of a linear may lie apart (those of gate and up alternate), so a linear is a tensor
[tiles, elements of a tile] whose rows are contiguous.

Everything here copies between memory that there is, one `copy_` of permuted views for codes, one or
two for scales: it allocates nothing, and on a GPU it is enqueued on the current stream.
"""

from __future__ import annotations

import torch

from oomproof.formats import BLOCK_SIZE

TILE_ROWS = 16
"""Rows of a tile."""
COLUMNS_UNIT = 128
"""Columns are whole multiples of it: an even number of blocks."""
FRAGMENT_BYTES = 512
"""Codes of one block of columns of a tile."""
GROUP_BLOCKS = 8
"""Blocks whose scales lie together."""
_HALF = TILE_ROWS // 2


def can_tile(shape: tuple[int, int]) -> bool:
    """Whether a weight [rows, columns] divides into whole tiles; else it stays row-major."""
    rows, columns = shape
    return min(shape) > 0 and rows % TILE_ROWS == 0 and columns % COLUMNS_UNIT == 0


def tile_bytes(columns: int) -> int:
    """Bytes of codes of a tile."""
    return columns // BLOCK_SIZE * FRAGMENT_BYTES


def tile_scales(columns: int) -> int:
    """Scales of a tile."""
    return columns // BLOCK_SIZE * TILE_ROWS


def tiles_of(
    stream: torch.Tensor, tile: int, count: int, *, first: int = 0, stride: int = 1
) -> torch.Tensor:
    """`count` tiles of a stream, from the first on, as [count, tile].

    Args:
        stream: Flat, contiguous: the tiles of one or several linears.
        tile: Elements of a tile.
        count: Tiles of the linear.
        first: Its first one in the stream.
        stride: From one of its tiles to the next, in tiles.
    """
    return stream.view(-1, tile)[first : first + (count - 1) * stride + 1 : stride]


def tile_codes(codes: torch.Tensor, tiles: torch.Tensor) -> None:
    """Row-major codes, uint8 [rows, columns / 2] → their tiles, [rows / 16, tile_bytes]."""
    tiled, row_major = _codes(tiles, codes)
    tiled.copy_(row_major)


def untile_codes(tiles: torch.Tensor, codes: torch.Tensor) -> None:
    """The inverse of `tile_codes`."""
    tiled, row_major = _codes(tiles, codes)
    row_major.copy_(tiled)


def tile_scale_rows(scales: torch.Tensor, tiles: torch.Tensor) -> None:
    """Row-major scales, [rows, columns / 64] → their tiles, [rows / 16, tile_scales]."""
    for tiled, row_major in _scales(tiles, scales):
        tiled.copy_(row_major)


def untile_scale_rows(tiles: torch.Tensor, scales: torch.Tensor) -> None:
    """The inverse of `tile_scale_rows`."""
    for tiled, row_major in _scales(tiles, scales):
        row_major.copy_(tiled)


def _codes(tiles: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of both: [tile, block, g, t, j, pair, half], lane 4g + t, byte 4j + 2 pair + half."""
    count, blocks = len(tiles), tiles.shape[1] // FRAGMENT_BYTES
    rows = codes.view(count, 2, _HALF, blocks, 4, 4, 2)
    return tiles.unflatten(1, (blocks, _HALF, 4, 4, 2, 2)), rows.permute(0, 3, 2, 4, 5, 6, 1)


def _scales(tiles: torch.Tensor, scales: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of both: [tile, group, g, pair of blocks, half, block]; the last group has its own."""
    count, blocks = len(tiles), tiles.shape[1] // TILE_ROWS
    rows = scales.view(count, 2, _HALF, blocks)
    groups, rest = divmod(blocks, GROUP_BLOCKS)
    found = []
    for first, number, size in ((0, groups, GROUP_BLOCKS), (groups * GROUP_BLOCKS, 1, rest)):
        if number and size:
            tiled = tiles[:, first * TILE_ROWS : (first + number * size) * TILE_ROWS]
            part = rows[..., first : first + number * size].unflatten(3, (number, size // 2, 2))
            found.append(
                (
                    tiled.unflatten(1, (number, _HALF, size // 2, 2, 2)),
                    part.permute(0, 3, 2, 4, 1, 5),
                )
            )
    return found
