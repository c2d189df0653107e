# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the kernels that multiply, by rank and element size: static, so that the
interpreter, the ahead-of-time check and a GPU run the same code.

Each row is the largest tile that compiles without spilling a register for sm_80, sm_86, sm_90 and
sm_100 and fits the 99 kB of shared memory of sm_86. In fp32 the products run on plain FMA units in
full precision, whose operands all pass through registers: those tiles are small.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    rows: int
    columns: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.num_warps,
            "num_stages": self.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip


_LARGE, _WIDE = Tile(64, 64, 4, 3), Tile(64, 64, 8, 3)
_SHALLOW, _SMALL = Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)

# kernel -> bytes of an element -> the rank, rounded up, -> tile
TILES: dict[str, dict[int, dict[int, Tile]]] = {
    "down": {
        2: {16: _LARGE, 32: _LARGE, 64: _LARGE, 128: _LARGE, 256: _WIDE},
        4: {16: _SHALLOW, 32: _SMALL, 64: _SHALLOW, 128: _SMALL, 256: Tile(64, 16, 8, 2)},
    },
    "up_grad": {
        2: {16: _LARGE, 32: _LARGE, 64: _WIDE, 128: Tile(32, 64, 4, 2), 256: Tile(32, 64, 8, 2)},
        4: {16: _SHALLOW, 32: _SMALL, 64: Tile(64, 16, 8, 2), 128: Tile(64, 16, 8, 2),
            256: Tile(32, 16, 8, 2)},
    },
    "down_grad": {
        2: {16: _LARGE, 32: _LARGE, 64: _LARGE, 128: _LARGE, 256: _WIDE},
        4: {16: _SMALL, 32: _SMALL, 64: Tile(16, 64, 8, 2), 128: Tile(16, 32, 8, 2),
            256: Tile(16, 32, 8, 2)},
    },
    "row_norm": {
        2: {16: _LARGE, 32: _LARGE, 64: _WIDE, 128: _WIDE},
        4: {16: Tile(32, 64, 8, 2), 32: Tile(32, 64, 8, 2), 64: Tile(32, 64, 8, 2),
            128: Tile(16, 32, 8, 2)},
    },
}  # fmt: skip

# several adapters in a batch: what is looked up takes registers where one adapter fills them all
TILES["mixed_down"] = {
    2: TILES["down"][2],
    4: TILES["down"][4] | {256: Tile(32, 16, 8, 2)},
}
TILES["mixed_up_grad"] = {
    2: TILES["up_grad"][2],
    4: TILES["up_grad"][4]
    | {32: Tile(32, 16, 4, 2), 128: Tile(32, 16, 8, 2), 256: Tile(16, 16, 8, 2)},
}

# input_grad adds up the rank in steps, its tile does not depend on it
INPUT_GRAD: dict[int, tuple[Tile, int]] = {2: (_LARGE, 64), 4: (_SHALLOW, 16)}
"""bytes of an element -> (tile, the largest step)"""

NORM_AGAIN = Tile(16, 64, 4, 1)
"""Rows of a norm that are added up again: few, so that one that cancels takes few along."""

# the same of a reflection; without the dropout it has registers for a load more, but on sm_100
# not with four warps
REFLECT: dict[int, tuple[Tile, int]] = {2: (_WIDE, 64), 4: (_SHALLOW, 16)}

ROTATE: dict[int, Tile] = {2: Tile(128, 64, 8, 3), 4: _SMALL}
ROTATE_GRAD: dict[int, Tile] = {2: Tile(128, 64, 8, 2), 4: _SMALL}
"""bytes of an element -> tile; its columns are the widest block that is not cut."""


def rank_block(r: int) -> int:
    """r as tl.dot takes it: a power of two from 16 on."""
    return max(16, 1 << (r - 1).bit_length())


def tile(kernel: str, r: int, itemsize: int) -> Tile:
    return TILES[kernel][itemsize][rank_block(r)]


class GemmTile(NamedTuple):
    """out x depth weights are decoded a round, for 16 tokens or for ``tokens``."""

    out: int
    depth: int
    tokens: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        return {
            "OUT": self.out, "DEPTH": self.depth, "num_warps": self.num_warps,
            "num_stages": self.num_stages, "enable_fp_fusion": False,
        }  # fmt: skip


GEMM_BLOCK = 64
"""A tile's extent along k: a row of it has one scale."""

# (y = x W^T or dx = g W, bytes of an element) -> tile. 64 weights a thread spread what a round
# costs besides decoding: 64 x 64 takes 10.3 instructions a weight on sm_90, these 7.2 to 8.0.
GEMM: dict[tuple[bool, int], GemmTile] = {
    (True, 2): GemmTile(128, GEMM_BLOCK, 64, 4, 3),
    (False, 2): GemmTile(GEMM_BLOCK, 128, 64, 4, 3),
    (True, 4): GemmTile(64, GEMM_BLOCK, 16, 4, 2),
    (False, 4): GemmTile(GEMM_BLOCK, 32, 32, 4, 2),
}


def gemm(transposed: bool, itemsize: int) -> GemmTile:
    return GEMM[transposed, itemsize]
