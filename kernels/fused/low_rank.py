# SPDX-License-Identifier: Apache-2.0
"""The four skinny products of the low-rank branch; the base product stays with cuBLAS.

    u = drop(x) A^T        du = s g B,  dB = s g^T u  (g is read once)
    dA = du^T drop(x)      dx = drop'(du A)

Each reads its large operand once, makes the mask again from the seed, accumulates in fp32, and is
deterministic: reductions that are split write partial sums, which are added in a fixed order.
    x: (m, k)  g: (m, n)  a: (r, k)  b: (n, r)  u, du: (m, r)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import splits, why_not_here
from .philox import keep_tile
from .tiles import INPUT_GRAD, rank_block, tile


@triton.jit
def _dropped(value, seed, rows, column, k, threshold, scale, DROP: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A tile of drop(x), in the tile's own dtype."""
    if DROP:
        keep = keep_tile(seed, rows, column, k, threshold, ROWS, COLUMNS)
        return (value.to(tl.float32) * tl.where(keep, scale, 0.0)).to(value.dtype)
    return value


@triton.jit
def down_kernel(x, a, seed, parts, m, k, r, stride_x, threshold, scale, depth,
                DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                RANK: tl.constexpr):  # fmt: skip
    """parts[split] = drop(x)[:, chunk] A[:, chunk]^T; grid (row blocks, splits)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    here = (rows < m)[:, None]
    acc = tl.zeros((ROWS, RANK), tl.float32)
    key = tl.load(seed) if DROP else 0
    first = split * depth * COLUMNS
    for column in range(first, min(first + depth * COLUMNS, k), COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        inside = (columns < k)[None, :]
        tile = tl.load(x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :],
                       mask=here & inside, other=0.0)  # fmt: skip
        tile = _dropped(tile, key, rows, column, k, threshold, scale, DROP, ROWS, COLUMNS)
        w = tl.load(a + ranks[:, None] * k + columns[None, :],
                    mask=(ranks < r)[:, None] & inside, other=0.0)  # fmt: skip
        acc = tl.dot(tile, tl.trans(w), acc, input_precision="ieee")
    place = (split.to(tl.int64) * m + rows)[:, None] * r + ranks[None, :]
    tl.store(parts + place, acc, mask=here & (ranks < r)[None, :])


@triton.jit
def up_grad_kernel(g, u, b, du_parts, db_parts, m, n, r, stride_g, depth,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    """One pass over g: du_parts[column block] and db_parts[split]; grid (column blocks, splits)."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    inside, used = columns < n, ranks < r
    w = tl.load(b + columns[:, None] * r + ranks[None, :],
                mask=inside[:, None] & used[None, :], other=0.0)  # fmt: skip
    db = tl.zeros((COLUMNS, RANK), tl.float32)
    first = split * depth * ROWS
    for row in range(first, min(first + depth * ROWS, m), ROWS):
        rows = row + tl.arange(0, ROWS)
        here = (rows < m)[:, None]
        tile = tl.load(g + rows.to(tl.int64)[:, None] * stride_g + columns[None, :],
                       mask=here & inside[None, :], other=0.0)  # fmt: skip
        part = tl.dot(tile, w, input_precision="ieee")
        place = (block.to(tl.int64) * m + rows)[:, None] * r + ranks[None, :]
        tl.store(du_parts + place, part, mask=here & used[None, :])
        hidden = tl.load(u + rows.to(tl.int64)[:, None] * r + ranks[None, :],
                         mask=here & used[None, :], other=0.0)  # fmt: skip
        db = tl.dot(tl.trans(tile), hidden, db, input_precision="ieee")
    place = (split.to(tl.int64) * n + columns)[:, None] * r + ranks[None, :]
    tl.store(db_parts + place, db, mask=inside[:, None] & used[None, :])


@triton.jit
def down_grad_kernel(x, du, seed, parts, m, k, r, stride_x, threshold, scale, depth,
                     DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                     RANK: tl.constexpr):  # fmt: skip
    """parts[split] = du[chunk]^T drop(x)[chunk]; grid (column blocks, splits)."""
    column = tl.program_id(0) * COLUMNS
    split = tl.program_id(1)
    columns = column + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    inside, used = (columns < k)[None, :], ranks < r
    acc = tl.zeros((RANK, COLUMNS), tl.float32)
    key = tl.load(seed) if DROP else 0
    first = split * depth * ROWS
    for row in range(first, min(first + depth * ROWS, m), ROWS):
        rows = row + tl.arange(0, ROWS)
        here = (rows < m)[:, None]
        tile = tl.load(x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :],
                       mask=here & inside, other=0.0)  # fmt: skip
        tile = _dropped(tile, key, rows, column, k, threshold, scale, DROP, ROWS, COLUMNS)
        grad = tl.load(du + rows.to(tl.int64)[:, None] * r + ranks[None, :],
                       mask=here & used[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(tl.trans(grad), tile, acc, input_precision="ieee")
    place = (split.to(tl.int64) * r + ranks)[:, None] * k + columns[None, :]
    tl.store(parts + place, acc, mask=used[:, None] & inside)


@triton.jit
def input_grad_kernel(du, a, seed, dx, m, k, r, threshold, scale,
                      DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                      RANKS: tl.constexpr):  # fmt: skip
    """dx = drop'(du A), RANKS of the r products at a time; grid (row blocks, column blocks)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    here, inside = (rows < m)[:, None], (columns < k)[None, :]
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, r, RANKS):
        ranks = first + tl.arange(0, RANKS)
        used = ranks < r
        grad = tl.load(du + rows.to(tl.int64)[:, None] * r + ranks[None, :],
                       mask=here & used[None, :], other=0.0)  # fmt: skip
        w = tl.load(a + ranks[:, None] * k + columns[None, :],
                    mask=used[:, None] & inside, other=0.0)  # fmt: skip
        value = tl.dot(grad, w, value, input_precision="ieee")
    if DROP:
        keep = keep_tile(tl.load(seed), rows, column, k, threshold, ROWS, COLUMNS)
        value = value * tl.where(keep, scale, 0.0)
    place = rows.to(tl.int64)[:, None] * k + columns[None, :]
    tl.store(dx + place, value.to(dx.dtype.element_ty), mask=here & inside)


def down(x: Tensor, a: Tensor, p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """u = drop(x) A^T: (m, k), (r, k) -> (m, r) in ``dtype``."""
    (m, k), r = x.shape, a.shape[0]
    if m == 0 or k == 0:
        return torch.zeros((m, r), dtype=dtype, device=x.device)
    x, a = _rowwise(x), a.to(x.dtype).contiguous()
    size = tile("down", r, x.itemsize)
    tiles, steps = triton.cdiv(m, size.rows), triton.cdiv(k, size.columns)
    depth = triton.cdiv(steps, splits(tiles, steps, x.device))
    parts = x.new_empty((triton.cdiv(steps, depth), m, r), dtype=torch.float32)
    down_kernel[(tiles, parts.shape[0])](
        x, a, x if seed is None else seed, parts, m, k, r, x.stride(0), *_threshold(p), depth,
        DROP=seed is not None, RANK=rank_block(r), **size.launch(),
    )  # fmt: skip
    return _summed(parts, dtype)


def up_grad(g: Tensor, u: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """du = s g B (m, r) in g's dtype, dB = s g^T u (n, r) in b's."""
    (m, n), r = g.shape, b.shape[1]
    if m == 0 or n == 0:
        return g.new_zeros((m, r)), b.new_zeros((n, r))
    g, u = _rowwise(g), u.to(g.dtype).contiguous()
    w = (b * scale).to(g.dtype).contiguous()
    size = tile("up_grad", r, g.itemsize)
    tiles, steps = triton.cdiv(n, size.columns), triton.cdiv(m, size.rows)
    depth = triton.cdiv(steps, splits(tiles, steps, g.device))
    du_parts = g.new_empty((tiles, m, r), dtype=torch.float32)
    db_parts = g.new_empty((triton.cdiv(steps, depth), n, r), dtype=torch.float32)
    up_grad_kernel[(tiles, db_parts.shape[0])](
        g, u, w, du_parts, db_parts, m, n, r, g.stride(0), depth,
        RANK=rank_block(r), **size.launch(),
    )  # fmt: skip
    return _summed(du_parts, g.dtype), _summed(db_parts, torch.float32).mul_(scale).to(b.dtype)


def down_grad(x: Tensor, du: Tensor, p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dA = du^T drop(x): (r, k) in ``dtype``."""
    (m, k), r = x.shape, du.shape[1]
    if m == 0 or k == 0:
        return torch.zeros((r, k), dtype=dtype, device=x.device)
    x, du = _rowwise(x), du.to(x.dtype).contiguous()
    size = tile("down_grad", r, x.itemsize)
    tiles, steps = triton.cdiv(k, size.columns), triton.cdiv(m, size.rows)
    depth = triton.cdiv(steps, splits(tiles, steps, x.device))
    parts = x.new_empty((triton.cdiv(steps, depth), r, k), dtype=torch.float32)
    down_grad_kernel[(tiles, parts.shape[0])](
        x, du, x if seed is None else seed, parts, m, k, r, x.stride(0), *_threshold(p), depth,
        DROP=seed is not None, RANK=rank_block(r), **size.launch(),
    )  # fmt: skip
    return _summed(parts, dtype)


def input_grad(du: Tensor, a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """dx = drop'(du A): (m, k) in du's dtype."""
    (m, r), k = du.shape, a.shape[1]
    dx = du.new_empty((m, k))
    if dx.numel():
        size, step = INPUT_GRAD[du.itemsize]
        grid = (triton.cdiv(m, size.rows), triton.cdiv(k, size.columns))
        input_grad_kernel[grid](
            du.contiguous(), a.to(du.dtype).contiguous(), du if seed is None else seed, dx, m, k,
            r, *_threshold(p), DROP=seed is not None, RANKS=min(step, rank_block(r)),
            **size.launch(),
        )  # fmt: skip
    return dx


def why_not(device: torch.device, k: int, r: int, dtype: torch.dtype, drops: bool) -> str | None:
    """Why these kernels cannot serve a branch of this size."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {dtype}"
    if r > 256:
        return f"r={r} is more than 256"
    if drops and k % 8:
        return f"k={k} is not a multiple of 8, the lanes of a dropout mask"
    return why_not_here(device)


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _threshold(p: float) -> tuple[int, float]:
    threshold = round(p * 65536)
    return threshold, 65536 / (65536 - threshold)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)
