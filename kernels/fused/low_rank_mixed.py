# SPDX-License-Identifier: Apache-2.0
"""The four skinny products of ``low_rank`` for several adapters in one batch, one launch each.

    x: (m, k)  g: (m, n)  u, du: (m, most of the ranks), zeros after a row's own rank
    A and B^T of all adapters one below the other: (sum of the ranks, k or n)

A tile of rows belongs to one adapter; which one, and the adapter's rank, scale and dropout, are
looked up (``mixed_plan``). The sums of an adapter run over its tiles in their order; one that is
split writes partial sums, which are added in a fixed order: deterministic, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import splits
from .low_rank import _dropped, _rowwise, _summed
from .mixed_plan import ADAPTER, TILE, Plan
from .philox import keep_tile
from .tiles import INPUT_GRAD, rank_block, tile


@triton.jit
def mixed_down_kernel(x, w, seeds, tiles, adapters, factors, parts, m, k, r, stride_x, depth,
                      DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                      RANK: tl.constexpr, TILE: tl.constexpr, ADAPTER: tl.constexpr):  # fmt: skip
    """parts[split] = drop(x)[:, chunk] A_i[:, chunk]^T; grid (tiles, splits)."""
    first_row, end, who, local = _tile(tiles, tl.program_id(0), TILE)
    start, rank, threshold = _adapter(adapters, who, ADAPTER)
    split = tl.program_id(1)
    rows, ranks = first_row + tl.arange(0, ROWS), tl.arange(0, RANK)
    mine = local + tl.arange(0, ROWS)
    here, used = (rows < end)[:, None], ranks < rank
    key = tl.load(seeds + who) if DROP else 0
    keep = tl.load(factors + 2 * who + 1)
    acc = tl.zeros((ROWS, RANK), tl.float32)
    first = split * depth * COLUMNS
    for column in range(first, min(first + depth * COLUMNS, k), COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        inside = (columns < k)[None, :]
        part = tl.load(x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :],
                       mask=here & inside, other=0.0)  # fmt: skip
        part = _dropped(part, key, mine, column, k, threshold, keep, DROP, ROWS, COLUMNS)
        a = tl.load(w + (start + ranks)[:, None] * k + columns[None, :],
                    mask=used[:, None] & inside, other=0.0)  # fmt: skip
        acc = tl.dot(part, tl.trans(a), acc, input_precision="ieee")
    place = (split.to(tl.int64) * m + rows)[:, None] * r + ranks[None, :]
    tl.store(parts + place, acc, mask=here & (ranks < r)[None, :])


@triton.jit
def mixed_up_kernel(u, w, seeds, tiles, adapters, factors, y, n, r, DROP: tl.constexpr,
                    SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    RANKS: tl.constexpr, TILE: tl.constexpr, ADAPTER: tl.constexpr):  # fmt: skip
    """y = s_i u B_i^T (SCALED) or drop'(u A_i); grid (tiles, column blocks)."""
    first_row, end, who, local = _tile(tiles, tl.program_id(0), TILE)
    start, rank, threshold = _adapter(adapters, who, ADAPTER)
    rows = first_row + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    here, inside = (rows < end)[:, None], (columns < n)[None, :]
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        used = ranks < rank
        left = tl.load(u + rows.to(tl.int64)[:, None] * r + ranks[None, :],
                       mask=here & used[None, :], other=0.0)  # fmt: skip
        right = tl.load(w + (start + ranks)[:, None] * n + columns[None, :],
                        mask=used[:, None] & inside, other=0.0)  # fmt: skip
        value = tl.dot(left, right, value, input_precision="ieee")
    if SCALED:
        value = value * tl.load(factors + 2 * who)
    if DROP:
        mine = local + tl.arange(0, ROWS)
        keep = keep_tile(tl.load(seeds + who), mine, column, n, threshold, ROWS, COLUMNS)
        value = value * tl.where(keep, tl.load(factors + 2 * who + 1), 0.0)
    place = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=here & inside)


@triton.jit
def mixed_up_grad_kernel(g, u, w, tiles, adapters, factors, du_parts, db_parts, m, n, r, total,
                         stride_g, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                         RANK: tl.constexpr, TILE: tl.constexpr,
                         ADAPTER: tl.constexpr):  # fmt: skip
    """du_parts[column block] = s_i g B_i and db_parts[split] = s_i u^T g over the rows of adapter
    i, in one pass; grid (column blocks, adapters, splits)."""
    block, who, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, rank, _ = _adapter(adapters, who, ADAPTER)
    columns, ranks = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    inside, used, stored = columns < n, ranks < rank, (ranks < r)[None, :]
    scale = tl.load(factors + 2 * who)
    known = inside[:, None] & used[None, :]
    place_b = (start + ranks)[None, :] * n + columns[:, None]
    b = tl.load(w + place_b, mask=known, other=0.0)
    db = tl.zeros((COLUMNS, RANK), tl.float32)
    first = tl.load(adapters + ADAPTER * who + 3) + split * depth
    last = min(first + depth, tl.load(adapters + ADAPTER * who + 4))
    for i in range(first, last):
        row = tl.load(tiles + TILE * i)
        rows = row + tl.arange(0, ROWS)
        here = (rows < tl.load(tiles + TILE * i + 1))[:, None]
        grad = tl.load(g + rows.to(tl.int64)[:, None] * stride_g + columns[None, :],
                       mask=here & inside[None, :], other=0.0)  # fmt: skip
        part = tl.dot(grad, b, input_precision="ieee") * scale
        place = (block.to(tl.int64) * m + rows)[:, None] * r + ranks[None, :]
        tl.store(du_parts + place, part, mask=here & stored)
        hidden = tl.load(u + rows.to(tl.int64)[:, None] * r + ranks[None, :],
                         mask=here & used[None, :], other=0.0)  # fmt: skip
        db = tl.dot(tl.trans(grad), hidden, db, input_precision="ieee")
    place = split.to(tl.int64) * total * n + place_b
    tl.store(db_parts + place, db * scale, mask=known)


@triton.jit
def mixed_down_grad_kernel(x, du, seeds, tiles, adapters, factors, parts, k, r, total, stride_x,
                           depth, DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                           RANK: tl.constexpr, TILE: tl.constexpr,
                           ADAPTER: tl.constexpr):  # fmt: skip
    """parts[split] = du^T drop(x) over the rows of adapter i; grid (column blocks, adapters,
    splits)."""
    column, who, split = tl.program_id(0) * COLUMNS, tl.program_id(1), tl.program_id(2)
    start, rank, threshold = _adapter(adapters, who, ADAPTER)
    columns, ranks = column + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    inside, used = (columns < k)[None, :], ranks < rank
    key = tl.load(seeds + who) if DROP else 0
    keep = tl.load(factors + 2 * who + 1)
    acc = tl.zeros((RANK, COLUMNS), tl.float32)
    first = tl.load(adapters + ADAPTER * who + 3) + split * depth
    last = min(first + depth, tl.load(adapters + ADAPTER * who + 4))
    for i in range(first, last):
        row, end = tl.load(tiles + TILE * i), tl.load(tiles + TILE * i + 1)
        rows = row + tl.arange(0, ROWS)
        here = (rows < end)[:, None]
        part = tl.load(x + rows.to(tl.int64)[:, None] * stride_x + columns[None, :],
                       mask=here & inside, other=0.0)  # fmt: skip
        mine = tl.load(tiles + TILE * i + 3) + tl.arange(0, ROWS)
        part = _dropped(part, key, mine, column, k, threshold, keep, DROP, ROWS, COLUMNS)
        grad = tl.load(du + rows.to(tl.int64)[:, None] * r + ranks[None, :],
                       mask=here & used[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(tl.trans(grad), part, acc, input_precision="ieee")
    place = (split.to(tl.int64) * total + start + ranks)[:, None] * k + columns[None, :]
    tl.store(parts + place, acc, mask=used[:, None] & inside)


@triton.jit
def _tile(tiles, i, TILE: tl.constexpr):
    """First row, end, adapter, and which of the adapter's rows the first is."""
    at = tiles + TILE * i
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _adapter(adapters, who, ADAPTER: tl.constexpr):
    """Where its ranks start, how many there are, and its dropout's threshold."""
    at = adapters + ADAPTER * who
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


def row_tiles(r: int, itemsize: int) -> tuple[int, ...]:
    """The heights of the tiles that these kernels take."""
    skinny = (tile(name, r, itemsize).rows for name in ("mixed_down", "mixed_up_grad", "down_grad"))
    return *skinny, INPUT_GRAD[itemsize][0].rows


def forward(
    x: Tensor, a: list[Tensor], b: list[Tensor], seeds: Tensor | None, plan: Plan,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (m, n), the low-rank parts, and u (m, r), both in ``dtype``; zeros in rows of no
    adapter."""
    (m, k), n, r = x.shape, b[0].shape[0], plan.most
    x, w = _rowwise(x.to(dtype)), torch.cat(a).to(dtype)
    size = tile("mixed_down", r, x.itemsize)
    tiles = plan.tiles(size.rows)
    if len(tiles) == 0:
        return x.new_zeros((m, n)), x.new_zeros((m, r))
    steps = triton.cdiv(k, size.columns)
    depth = triton.cdiv(steps, splits(len(tiles), steps, x.device))
    empty = x.new_empty if plan.covers else x.new_zeros
    parts = empty((triton.cdiv(steps, depth), m, r), dtype=torch.float32)
    mixed_down_kernel[(len(tiles), parts.shape[0])](
        x, w, x if seeds is None else seeds, tiles, *plan.tables(size.rows), parts, m, k, r,
        x.stride(0), depth, DROP=seeds is not None, RANK=rank_block(r), TILE=TILE,
        ADAPTER=ADAPTER, **size.launch(),
    )  # fmt: skip
    u = _summed(parts, dtype)
    return _up(u, torch.cat([v.t() for v in b]).to(dtype), None, plan, n, scaled=True), u


def backward(
    g: Tensor, x: Tensor, u: Tensor, a: list[Tensor], b: list[Tensor], seeds: Tensor | None,
    plan: Plan, need_x: bool, need_a: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:  # fmt: skip
    """dx of the low-rank parts (m, k) in u's dtype, then da (none unless needed) and db of each
    adapter."""
    (m, n), k, r, total = g.shape, x.shape[1], plan.most, sum(plan.ranks)
    g, u = _rowwise(g.to(u.dtype)), u.contiguous()
    size = tile("mixed_up_grad", r, g.itemsize)
    tiles = plan.tiles(size.rows)
    blocks, steps = triton.cdiv(n, size.columns), plan.longest(size.rows)
    depth = triton.cdiv(steps, splits(blocks * len(a), steps, g.device))
    count = triton.cdiv(steps, depth)
    du_parts = g.new_empty((blocks, m, r), dtype=torch.float32)
    db_parts = g.new_empty((count, total, n), dtype=torch.float32)
    mixed_up_grad_kernel[(blocks, len(a), count)](
        g, u, torch.cat([v.t() for v in b]).to(g.dtype), tiles, *plan.tables(size.rows), du_parts,
        db_parts, m, n, r, total, g.stride(0), depth, RANK=rank_block(r), TILE=TILE,
        ADAPTER=ADAPTER, **size.launch(),
    )  # fmt: skip
    du = _summed(du_parts, g.dtype)
    db = torch.split_with_sizes_copy(_summed(db_parts, b[0].dtype).t(), plan.ranks, 1)
    da: tuple[Tensor, ...] = ()
    if need_a:
        x = _rowwise(x.to(g.dtype))
        size = tile("down_grad", r, x.itemsize)
        tiles = plan.tiles(size.rows)
        blocks, steps = triton.cdiv(k, size.columns), plan.longest(size.rows)
        depth = triton.cdiv(steps, splits(blocks * len(a), steps, x.device))
        count = triton.cdiv(steps, depth)
        da_parts = x.new_empty((count, total, k), dtype=torch.float32)
        mixed_down_grad_kernel[(blocks, len(a), count)](
            x, du, x if seeds is None else seeds, tiles, *plan.tables(size.rows), da_parts, k, r,
            total, x.stride(0), depth, DROP=seeds is not None, RANK=rank_block(r), TILE=TILE,
            ADAPTER=ADAPTER, **size.launch(),
        )  # fmt: skip
        da = torch.split_with_sizes_copy(_summed(da_parts, a[0].dtype), plan.ranks, 0)
    dx = _up(du, torch.cat(a).to(du.dtype), seeds, plan, k, scaled=False) if need_x else None
    return (
        dx,
        [t.to(v.dtype) for t, v in zip(da, a, strict=False)],
        [t.to(v.dtype) for t, v in zip(db, b, strict=True)],
    )


def _up(u: Tensor, w: Tensor, seeds: Tensor | None, plan: Plan, n: int, *, scaled: bool) -> Tensor:
    """(m, n) in u's dtype, zeros in rows of no adapter."""
    size, step = INPUT_GRAD[u.itemsize]
    y = (u.new_empty if plan.covers else u.new_zeros)((u.shape[0], n))
    tiles = plan.tiles(size.rows)
    if len(tiles) == 0:
        return y
    mixed_up_kernel[(len(tiles), triton.cdiv(n, size.columns))](
        u, w, u if seeds is None else seeds, tiles, *plan.tables(size.rows), y, n, plan.most,
        DROP=seeds is not None, SCALED=scaled, RANKS=min(step, rank_block(plan.most)), TILE=TILE,
        ADAPTER=ADAPTER, **size.launch(),
    )  # fmt: skip
    return y
