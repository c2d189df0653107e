# SPDX-License-Identifier: Apache-2.0
"""|| W + s B A || of each row from its factors, reading W (dense or 4-bit) once.

    norm_i^2 = ||W_i||^2 + 2 s <B_i, U_i> + s^2 B_i G B_i^T,   U = W A^T,  G = A A^T

B A and the decoded W never reach memory. Everything accumulates in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import why_not_here
from .nf4 import TL_DTYPE, decode, decode_tile, scale_of, words
from .tiles import rank_block, tile


@triton.jit
def row_norm_kernel(
    w, absmax, code, nested_absmax, nested_code, offset, a, b, gram_b, norm, n, k, r, stride_row,
    stride_column, scale, PACKED: tl.constexpr, ALIGNED: tl.constexpr, QBLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """gram_b = B G: (n, r); ALIGNED: tiles are whole and lie in one quantisation block a row.
    grid (row blocks,)."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ranks = tl.arange(0, RANK)
    here, used = rows < n, ranks < r
    w_rows = tl.minimum(rows, n - 1)
    u = tl.zeros((ROWS, RANK), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for column in range(0, k, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        inside = columns < k
        if ALIGNED:
            tile = decode_tile(w, absmax, code, nested_absmax, nested_code, offset, w_rows,
                               column, k, QBLOCK, NESTED_BLOCK, COLUMNS).to(ROUND)  # fmt: skip
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
        wide = tile.to(tl.float32)
        square += tl.sum(wide * wide, 1)
        factor = tl.load(a + ranks[:, None] * k + columns[None, :],
                         mask=used[:, None] & inside[None, :], other=0.0)  # fmt: skip
        u = tl.dot(tile, tl.trans(factor.to(tile.dtype)), u, input_precision="ieee")
    place, valid = rows[:, None] * r + ranks[None, :], here[:, None] & used[None, :]
    left = tl.load(b + place, mask=valid, other=0.0)
    right = 2 * scale * u + scale * scale * tl.load(gram_b + place, mask=valid, other=0.0)
    total = square + tl.sum(left * right, 1)
    # a sum of squares that cancels to below zero is zero
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
    # the low-rank pair as the product sees it, so that the three terms agree
    a = a.to(dtype).contiguous()
    wide_a, wide_b = a.float(), b.float().contiguous()
    gram_b = wide_b @ (wide_a @ wide_a.t())
    size = tile("row_norm", r, dtype.itemsize)
    launch = size.launch() | {"enable_fp_fusion": not packed}
    weight = words(w) if packed else w
    aligned = weight.dtype == torch.int32 and k % size.columns == blocksize % size.columns == 0
    row_norm_kernel[(triton.cdiv(n, size.rows),)](
        weight if aligned or not packed else w.reshape(-1), absmax if packed else w,
        code if packed else w, nested_absmax if nested else w, nested_code if nested else w,
        offset if nested else w, a, wide_b, gram_b, norm, n, k, r,
        *((0, 0) if packed else w.stride()), scale, PACKED=packed, ALIGNED=packed and aligned,
        QBLOCK=blocksize if packed else 1, NESTED_BLOCK=nested_blocksize if nested else 0,
        ROUND=TL_DTYPE[dtype], RANK=rank_block(r), **launch,
    )  # fmt: skip
    return norm


def why_not_row_norm(a: Tensor, b: Tensor, scale: float, w: Tensor, *rest: object) -> str | None:
    dtype, k = rest[-1], rest[-2]
    if dtype not in TL_DTYPE:
        return f"W is {dtype}"
    if a.shape[0] > 128:
        return f"r={a.shape[0]} is more than 128"
    if rest[0] is not None and isinstance(k, int) and k % 2:
        return f"k={k} is odd and W is packed in bytes"
    return why_not_here(w.device)
