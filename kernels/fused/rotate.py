# SPDX-License-Identifier: Apache-2.0
"""y = x + x diag(D_1 .. D_g), and both gradients in one pass over g and x.

    x, g: (m, k)  d: (g, s, s), repeated k / (g s) times

Small blocks are packed into a tile with zeros between them, large ones are cut into tiles. The
permutation of a butterfly is in the addresses: no copy is made. fp32 accumulation; sums over rows
are cut in parts, which are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import splits, why_not_here
from .nf4 import TL_DTYPE
from .tiles import ROTATE, ROTATE_GRAD, Tile


@triton.jit
def _channels(j, unit, k, SIZE: tl.constexpr, PACK: tl.constexpr, APART: tl.constexpr,
              WHOLE: tl.constexpr):  # fmt: skip
    """Where channels j of a unit of PACK blocks stand, and which of them there are. WHOLE: tiles
    end where units do."""
    channel = unit * (PACK * SIZE) + j
    inside = channel < k
    if not WHOLE:
        inside = inside & (j < PACK * SIZE)
    if APART > 1:
        HALF: tl.constexpr = SIZE // 2
        RUN: tl.constexpr = HALF & -HALF
        block, place = channel // SIZE, channel % SIZE
        run = (block // APART * 2 + place // HALF) * APART + block % APART
        channel = tl.multiple_of(run * HALF + place % HALF, RUN)
        channel = tl.max_contiguous(channel, RUN)
    return channel, inside


@triton.jit
def _blocks(d, i, j, unit, k, count, SIZE: tl.constexpr, PACK: tl.constexpr,
            TURNED: tl.constexpr):  # fmt: skip
    """The tile (i, j) of the packed blocks of a unit, or of their transposes."""
    left, right = unit * PACK + i // SIZE, unit * PACK + j // SIZE
    same = left[:, None] == right[None, :]
    inside = same & (left < k // SIZE)[:, None] & (j < PACK * SIZE)[None, :]
    row, column = i % SIZE, j % SIZE
    start = (left % count).to(tl.int64)[:, None] * (SIZE * SIZE)
    if TURNED:
        place = start + column[None, :] * SIZE + row[:, None]
    else:
        place = start + row[:, None] * SIZE + column[None, :]
    return tl.load(d + place, mask=inside, other=0.0)


@triton.jit
def rotate_fwd_kernel(x, d, y, m, k, count, stride_x, SIZE: tl.constexpr, PACK: tl.constexpr,
                      APART: tl.constexpr, TURNED: tl.constexpr, WHOLE: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """y = x + x diag(D), D transposed where TURNED; grid (row blocks, tiles of all units)."""
    TILES: tl.constexpr = (PACK * SIZE + COLUMNS - 1) // COLUMNS
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = (rows < m)[:, None]
    unit, tile = tl.program_id(1) // TILES, tl.program_id(1) % TILES
    lanes = tl.arange(0, COLUMNS)
    j = tile * COLUMNS + lanes
    kind = y.dtype.element_ty
    to, known = _channels(j, unit, k, SIZE, PACK, APART, WHOLE)
    own = tl.load(x + rows[:, None] * stride_x + to[None, :], mask=here & known[None, :],
                  other=0.0).to(kind)  # fmt: skip
    if TILES == 1:
        block = _blocks(d, j, j, unit, k, count, SIZE, PACK, TURNED)
        turned = tl.dot(own, block.to(kind), input_precision="ieee")
    else:
        turned = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(0, TILES):
            i = step * COLUMNS + lanes
            at, inside = _channels(i, unit, k, SIZE, PACK, APART, WHOLE)
            part = tl.load(x + rows[:, None] * stride_x + at[None, :],
                           mask=here & inside[None, :], other=0.0).to(kind)  # fmt: skip
            block = _blocks(d, i, j, unit, k, count, SIZE, PACK, TURNED)
            turned = tl.dot(part, block.to(kind), turned, input_precision="ieee")
    value = (own.to(tl.float32) + turned).to(kind)
    tl.store(y + rows[:, None] * k + to[None, :], value, mask=here & known[None, :])


@triton.jit
def rotate_bwd_kernel(g, x, d, dx, parts, m, k, count, stride_g, stride_x, depth,
                      SIZE: tl.constexpr, PACK: tl.constexpr, APART: tl.constexpr,
                      WHOLE: tl.constexpr, DX: tl.constexpr, DD: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """dx = g + g diag(D^T) where a unit is one tile, and parts[split, block] = x^T g over a chunk
    of the rows; grid (pairs of tiles of all units, splits)."""
    TILES: tl.constexpr = (PACK * SIZE + COLUMNS - 1) // COLUMNS
    tl.static_assert(TILES == 1 or not DX)
    unit, pair = tl.program_id(0) // (TILES * TILES), tl.program_id(0) % (TILES * TILES)
    split = tl.program_id(1)
    lanes = tl.arange(0, COLUMNS)
    i, j = pair // TILES * COLUMNS + lanes, pair % TILES * COLUMNS + lanes
    at, inside = _channels(i, unit, k, SIZE, PACK, APART, WHOLE)
    to, known = _channels(j, unit, k, SIZE, PACK, APART, WHOLE)
    kind = g.dtype.element_ty
    if DX:
        block = _blocks(d, j, j, unit, k, count, SIZE, PACK, True).to(kind)
    dd = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    first = split * depth * ROWS
    for row in range(first, min(first + depth * ROWS, m), ROWS):
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        here = (rows < m)[:, None]
        grad = tl.load(g + rows[:, None] * stride_g + to[None, :], mask=here & known[None, :],
                       other=0.0)  # fmt: skip
        if DD:
            left = tl.load(x + rows[:, None] * stride_x + at[None, :],
                           mask=here & inside[None, :], other=0.0).to(kind)  # fmt: skip
            dd = tl.dot(tl.trans(left), grad, dd, input_precision="ieee")
        if DX:
            value = grad.to(tl.float32) + tl.dot(grad, block, input_precision="ieee")
            tl.store(dx + rows[:, None] * k + to[None, :], value.to(dx.dtype.element_ty),
                     mask=here & known[None, :])  # fmt: skip
    if DD:
        left_block, right_block = unit * PACK + i // SIZE, unit * PACK + j // SIZE
        same = (left_block[:, None] == right_block[None, :]) & inside[:, None] & known[None, :]
        start = (split.to(tl.int64) * (k // SIZE) + left_block)[:, None] * (SIZE * SIZE)
        place = start + (i % SIZE)[:, None] * SIZE + (j % SIZE)[None, :]
        tl.store(parts + place, dd, mask=same)


def rotate_fwd(x: Tensor, d: Tensor, apart: int, out: torch.dtype) -> Tensor:
    """-> y in x's shape, contiguous, in ``out``."""
    return _turned(x, d, apart, out, False)


def rotate_bwd(
    g: Tensor, x: Tensor, d: Tensor, apart: int, need_x: bool, need_d: bool
) -> tuple[Tensor, Tensor]:
    """(dx in x's dtype, dD in d's); an empty tensor where none is needed."""
    dx, dd = x.new_empty(x.shape if need_x else 0), d.new_empty(d.shape if need_d else 0)
    if g.numel() == 0:
        return dx, dd.zero_()
    rows, grads = _rows(x), _rows(g)
    (m, k), (count, size) = rows.shape, d.shape[:2]
    launch = ROTATE_GRAD[g.itemsize]
    pack = max(1, launch.columns // size)
    tiles, units = _tiles(k, size, pack, launch)
    both = need_x and tiles == 1
    if need_x and not both:
        dx = _turned(g, d, apart, x.dtype, True)
    if not (need_d or both):
        return dx, dd
    steps = triton.cdiv(m, launch.rows)
    depth = triton.cdiv(steps, splits(units * tiles * tiles, steps, g.device))
    shape = (triton.cdiv(steps, depth), k // (count * size), count, size, size)
    parts = g.new_empty(shape if need_d else 0, dtype=torch.float32)
    rotate_bwd_kernel[(units * tiles * tiles, shape[0])](
        grads, rows, d.contiguous(), dx, parts, m, k, count, grads.stride(0), rows.stride(0), depth,
        DX=both, DD=need_d, **_fixed(size, pack, apart, launch),
    )  # fmt: skip
    return dx, parts.sum((0, 1)).to(d.dtype) if need_d else dd


def _turned(x: Tensor, d: Tensor, apart: int, out: torch.dtype, transposed: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=out, device=x.device)
    if y.numel() == 0:
        return y
    rows = _rows(x)
    (m, k), (count, size) = rows.shape, d.shape[:2]
    launch = ROTATE[out.itemsize]
    pack = max(1, launch.columns // size)
    tiles, units = _tiles(k, size, pack, launch)
    rotate_fwd_kernel[(triton.cdiv(m, launch.rows), units * tiles)](
        rows, d.contiguous(), y, m, k, count, rows.stride(0), TURNED=transposed,
        **_fixed(size, pack, apart, launch),
    )  # fmt: skip
    return y


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tiles(k: int, size: int, pack: int, tile: Tile) -> tuple[int, int]:
    """Tiles of a unit, units."""
    return triton.cdiv(pack * size, tile.columns), triton.cdiv(k, pack * size)


def _fixed(size: int, pack: int, apart: int, tile: Tile) -> dict[str, int]:
    whole = pack * size % tile.columns == 0
    return tile.launch() | {"SIZE": size, "PACK": pack, "APART": apart, "WHOLE": whole}


def why_not_rotate_fwd(x: Tensor, d: Tensor, apart: int, out: torch.dtype) -> str | None:
    return _why_not(x=x.dtype, d=d.dtype, y=out) or why_not_here(x.device)


def why_not_rotate_bwd(g: Tensor, x: Tensor, d: Tensor, *_: object) -> str | None:
    return _why_not(g=g.dtype, x=x.dtype, d=d.dtype) or why_not_here(x.device)


def _why_not(**dtypes: torch.dtype) -> str | None:
    wrong = (f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in TL_DTYPE)
    return next(wrong, None)
