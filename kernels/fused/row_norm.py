# SPDX-License-Identifier: Apache-2.0
"""|| W + s B A || of each row from its factors, reading W (dense or 4-bit) once.

    norm_i^2 = ||W_i||^2 + 2 s <B_i, U_i> + s^2 B_i G B_i^T,   U = W A^T,  G = A A^T

B A and the decoded W never reach memory. Everything accumulates in fp32. More than 128 ranks are
taken in chunks, whose programs run side by side and share what they read of W.

A sum that cancels loses digits: rows below a quarter of their squares' sum are added up again as
they are written, in fp32 and with A and B unrounded. Which rows those are the device decides: no
host waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import why_not_here
from .nf4 import TL_DTYPE, decode, decode_tile, scale_of, words
from .tiles import NORM_AGAIN, rank_block, tile

MOST_RANKS = 128
"""Ranks of a chunk."""


@triton.jit
def _weights(
    w, absmax, code, nested_absmax, nested_code, offset, row, column, n, k, stride_row,
    stride_column, PACKED: tl.constexpr, ALIGNED: tl.constexpr, QBLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of W; zeros past the last column, anything past the last row."""
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    columns = column + tl.arange(0, COLUMNS)
    here, inside = rows < n, columns < k
    if ALIGNED:
        within = tl.minimum(tl.arange(0, ROWS), n - 1 - row)
        tile = decode_tile(w, absmax, code, nested_absmax, nested_code, offset,
                           row, within, column, k, QBLOCK, NESTED_BLOCK,
                           COLUMNS).to(ROUND)  # fmt: skip
    elif PACKED:
        i = (rows[:, None] * k + column) // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        valid = here[:, None] & (column + 2 * tl.arange(0, COLUMNS // 2) < k)[None, :]
        byte = tl.load(w + i, mask=valid, other=0)
        s = scale_of(2 * i // QBLOCK, valid, absmax, nested_absmax, nested_code, offset,
                     NESTED_BLOCK)  # fmt: skip
        value = decode(byte, tl.load(code + tl.arange(0, 16))) * tl.interleave(s, s)
        tile = tl.where(inside[None, :], value, 0.0).to(ROUND)
    else:
        tile = tl.load(w + rows[:, None] * stride_row + columns[None, :] * stride_column,
                       mask=here[:, None] & inside[None, :], other=0.0)  # fmt: skip
    return tile


@triton.jit
def row_norm_kernel(
    w, absmax, code, nested_absmax, nested_code, offset, a, b, gram_b, parts, n, k, r, stride_row,
    stride_column, scale, PACKED: tl.constexpr, ALIGNED: tl.constexpr, QBLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """parts[chunk]: the terms of norm^2 of its ranks, and those of them that are squares; both with
    ||W_i||^2 in the first. gram_b = B G: (n, r); ALIGNED: tiles are whole and lie in one
    quantisation block a row. grid (row blocks, chunks of ranks)."""
    row = tl.program_id(0) * ROWS
    chunk = tl.program_id(1)
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    ranks = chunk * RANK + tl.arange(0, RANK)
    here, used = rows < n, ranks < r
    u = tl.zeros((ROWS, RANK), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for column in range(0, k, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        tile = _weights(w, absmax, code, nested_absmax, nested_code, offset, row, column, n, k,
                        stride_row, stride_column, PACKED, ALIGNED, QBLOCK, NESTED_BLOCK, ROUND,
                        ROWS, COLUMNS)  # fmt: skip
        wide = tile.to(tl.float32)
        square += tl.sum(wide * wide, 1)
        factor = tl.load(a + ranks[:, None] * k + columns[None, :],
                         mask=used[:, None] & (columns < k)[None, :], other=0.0)  # fmt: skip
        u = tl.dot(tile, tl.trans(factor.to(tile.dtype)), u, input_precision="ieee")
    place, valid = rows[:, None] * r + ranks[None, :], here[:, None] & used[None, :]
    left = tl.load(b + place, mask=valid, other=0.0)
    own = left * tl.load(gram_b + place, mask=valid, other=0.0) * (scale * scale)
    first = tl.where(chunk == 0, square, 0.0)
    at = chunk.to(tl.int64) * 2 * n + rows
    tl.store(parts + at, first + tl.sum(2 * scale * left * u + own, 1), mask=here)
    tl.store(parts + at + n, first + tl.sum(own, 1), mask=here)


@triton.jit
def row_norm_again_kernel(
    parts, w, absmax, code, nested_absmax, nested_code, offset, a, b, norm, n, k, r, chunks,
    stride_row, stride_column, scale, PACKED: tl.constexpr, ALIGNED: tl.constexpr,
    QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """The root of the sum over chunks; a block of rows with one that cancels is read again.
    a, b: fp32; grid (row blocks,)."""
    row = tl.program_id(0) * ROWS
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    here = rows < n
    total, squares = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for chunk in range(0, chunks):
        at = parts + chunk * 2 * n + rows
        total += tl.load(at, mask=here, other=0.0)
        squares += tl.load(at + n, mask=here, other=0.0)
    # not a number is no number that is large enough
    cancels = ((total >= squares / 4) == 0) & here
    if tl.max(cancels.to(tl.int32), 0) > 0:
        again = tl.zeros((ROWS,), tl.float32)
        for column in range(0, k, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            inside = (columns < k)[None, :]
            tile = _weights(w, absmax, code, nested_absmax, nested_code, offset, row, column, n, k,
                            stride_row, stride_column, PACKED, ALIGNED, QBLOCK, NESTED_BLOCK,
                            ROUND, ROWS, COLUMNS)  # fmt: skip
            more = tl.zeros((ROWS, COLUMNS), tl.float32)
            for rank in range(0, r, RANKS):
                ranks = rank + tl.arange(0, RANKS)
                used = ranks < r
                left = tl.load(b + rows[:, None] * r + ranks[None, :],
                               mask=here[:, None] & used[None, :], other=0.0)  # fmt: skip
                right = tl.load(a + ranks[:, None] * k + columns[None, :],
                                mask=used[:, None] & inside, other=0.0)  # fmt: skip
                more = tl.dot(left, right, more, input_precision="ieee")
            merged = tile.to(tl.float32) + scale * more
            again += tl.sum(merged * merged, 1)
        total = tl.where(cancels, again, total)
    tl.store(norm + rows, tl.sqrt(tl.maximum(total, 0.0)), mask=here)


def row_norm(
    a: Tensor, b: Tensor, scale: float, w: Tensor, absmax: Tensor | None, code: Tensor | None,
    nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    blocksize: int, nested_blocksize: int, n: int, k: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """-> (n,) float32."""
    norm = torch.empty(n, dtype=torch.float32, device=w.device)
    if n == 0:
        return norm
    packed, nested = absmax is not None, nested_absmax is not None
    r = a.shape[0]
    exact, wide_b = a.float().contiguous(), b.float().contiguous()
    # the low-rank pair as the product sees it, so that the three terms agree
    a = a.to(dtype).contiguous()
    gram_b = wide_b @ (a.float() @ a.float().t())
    size = tile("row_norm", min(r, MOST_RANKS), dtype.itemsize)
    rank = rank_block(min(r, MOST_RANKS))
    parts = norm.new_empty((triton.cdiv(r, rank), 2, n))
    weight = words(w) if packed else w
    flat = (absmax if packed else w, code if packed else w, nested_absmax if nested else w,
            nested_code if nested else w, offset if nested else w)  # fmt: skip
    strides = (0, 0) if packed else w.stride()

    def fixed(columns: int) -> tuple[Tensor, dict[str, object]]:
        """The weight as a tile of this width takes it, and what is compiled in."""
        aligned = weight.dtype == torch.int32 and k % columns == blocksize % columns == 0
        held = weight if aligned or not packed else w.reshape(-1)
        return held, {
            "PACKED": packed, "ALIGNED": packed and aligned, "QBLOCK": blocksize if packed else 1,
            "NESTED_BLOCK": nested_blocksize if nested else 0, "ROUND": TL_DTYPE[dtype],
        }  # fmt: skip

    held, constants = fixed(size.columns)
    launch = size.launch() | {"enable_fp_fusion": not packed}
    row_norm_kernel[(triton.cdiv(n, size.rows), parts.shape[0])](
        held, *flat, a, wide_b, gram_b, parts, n, k, r, *strides, scale, RANK=rank, **constants,
        **launch,
    )  # fmt: skip
    held, constants = fixed(NORM_AGAIN.columns)
    launch = NORM_AGAIN.launch() | {"enable_fp_fusion": not packed}
    row_norm_again_kernel[(triton.cdiv(n, NORM_AGAIN.rows),)](
        parts, held, *flat, exact, wide_b, norm, n, k, r, parts.shape[0], *strides, scale,
        RANKS=16, **constants, **launch,
    )  # fmt: skip
    return norm


def why_not_row_norm(a: Tensor, b: Tensor, scale: float, w: Tensor, *rest: object) -> str | None:
    dtype, k = rest[-1], rest[-2]
    if dtype not in TL_DTYPE:
        return f"W is {dtype}"
    if rest[0] is not None and isinstance(k, int) and k % 2:
        return f"k={k} is odd and W is packed in bytes"
    return why_not_here(w.device)
