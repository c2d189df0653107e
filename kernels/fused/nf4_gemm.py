# SPDX-License-Identifier: Apache-2.0
"""y += x W^T and dx += g W with W decoded in registers, for few tokens: W crosses the memory bus as
4 bits, where decoding it first costs 230 / m of the product's time on an H200 (computed).

    x: (m, k)  g: (m, n)  W: (n, k) packed  ->  (m, n), (m, k)

fp32 accumulation; a reduction that is split writes partial sums, added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import splits
from .nf4 import TL_DTYPE, decode_bytes, scale_of

MAX_TOKENS = 256
"""Above, decoding once and calling cuBLAS is faster on Hopper (computed by the roofline, not yet
measured)."""

_OUT, _DEPTH = 64, 64


@triton.jit
def _decoded_tile(packed, absmax, code, nested_absmax, nested_code, offset, table, rows, here,
                  column, k, QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
                  COLUMNS: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """W[rows, column ... column + COLUMNS]; the columns lie in one quantisation block a row."""
    start = rows * k + column
    place = start[:, None] // 2 + tl.arange(0, COLUMNS // 2)[None, :]
    byte = tl.load(packed + place, mask=here[:, None], other=0).to(tl.int32)
    scale = scale_of(start // QBLOCK, here, absmax, nested_absmax, nested_code, offset,
                     NESTED_BLOCK)  # fmt: skip
    high, low = decode_bytes(byte, table)
    return tl.interleave(high * scale[:, None], low * scale[:, None]).to(ROUND)


@triton.jit
def nf4_gemm_fwd_kernel(
    x, packed, absmax, code, nested_absmax, nested_code, offset, parts, m, n, k, stride_x, depth,
    QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, TOKENS: tl.constexpr,
    OUT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """parts[split] = x[:, chunk] W[:, chunk]^T; grid (n blocks, m blocks, splits).

    W is the left operand (y^T = W x^T), so that decoded values stay in registers."""
    rows = (tl.program_id(0) * OUT + tl.arange(0, OUT)).to(tl.int64)
    tokens = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    split = tl.program_id(2)
    here, known = rows < n, tokens < m
    table = tl.load(code + tl.arange(0, 16))
    acc = tl.zeros((OUT, TOKENS), tl.float32)
    first = split * depth * DEPTH
    for column in range(first, min(first + depth * DEPTH, k), DEPTH):
        w = _decoded_tile(packed, absmax, code, nested_absmax, nested_code, offset, table, rows,
                          here, column, k, QBLOCK, NESTED_BLOCK, DEPTH, ROUND)  # fmt: skip
        columns = column + tl.arange(0, DEPTH)
        xt = tl.load(x + tokens[None, :] * stride_x + columns[:, None], mask=known[None, :],
                     other=0.0)  # fmt: skip
        acc = tl.dot(w, xt, acc, input_precision="ieee")
    place = (split.to(tl.int64) * m + tokens)[None, :] * n + rows[:, None]
    tl.store(parts + place, acc, mask=here[:, None] & known[None, :])


@triton.jit
def nf4_gemm_bwd_kernel(
    g, packed, absmax, code, nested_absmax, nested_code, offset, parts, m, n, k, stride_g, depth,
    QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, TOKENS: tl.constexpr,
    OUT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """parts[split] = g[:, chunk] W[chunk]; grid (k blocks, m blocks, splits)."""
    column = tl.program_id(0) * OUT
    tokens = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    split = tl.program_id(2)
    known = tokens < m
    table = tl.load(code + tl.arange(0, 16))
    acc = tl.zeros((TOKENS, OUT), tl.float32)
    first = split * depth * DEPTH
    for row in range(first, min(first + depth * DEPTH, n), DEPTH):
        rows = (row + tl.arange(0, DEPTH)).to(tl.int64)
        here = rows < n
        w = _decoded_tile(packed, absmax, code, nested_absmax, nested_code, offset, table, rows,
                          here, column, k, QBLOCK, NESTED_BLOCK, OUT, ROUND)  # fmt: skip
        tile = tl.load(g + tokens[:, None] * stride_g + rows[None, :],
                       mask=known[:, None] & here[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(tile, w, acc, input_precision="ieee")
    columns = column + tl.arange(0, OUT)
    place = (split.to(tl.int64) * m + tokens)[:, None] * k + columns[None, :]
    tl.store(parts + place, acc, mask=known[:, None])


def serves(tokens: int, k: int, blocksize: int, dtype: torch.dtype) -> bool:
    """Few enough tokens, and tiles that lie inside quantisation blocks."""
    aligned = k % _DEPTH == 0 and k % _OUT == 0 and blocksize % _DEPTH == 0
    return 0 < tokens <= MAX_TOKENS and aligned and dtype in TL_DTYPE


def add_product(
    y: Tensor, x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor,
    nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    blocksize: int, nested_blocksize: int, n: int, k: int, dtype: torch.dtype, *, transposed: bool,
) -> Tensor:  # fmt: skip
    """y + x W^T (``transposed``) or y + x W, in y's dtype; W is rounded to x's dtype."""
    m = x.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out, inner = (n, k) if transposed else (k, n)
    tokens = max(16, min(64, triton.next_power_of_2(m)))
    tiles = triton.cdiv(out, _OUT) * triton.cdiv(m, tokens)
    steps = triton.cdiv(inner, _DEPTH)
    depth = triton.cdiv(steps, splits(tiles, steps, x.device))
    parts = x.new_empty((triton.cdiv(steps, depth), m, out), dtype=torch.float32)
    nested = nested_absmax is not None
    kernel = nf4_gemm_fwd_kernel if transposed else nf4_gemm_bwd_kernel
    kernel[(triton.cdiv(out, _OUT), triton.cdiv(m, tokens), parts.shape[0])](
        x, packed, absmax, code, nested_absmax if nested else code, nested_code if nested else code,
        offset if nested else code, parts, m, n, k, x.stride(0), depth, QBLOCK=blocksize,
        NESTED_BLOCK=nested_blocksize if nested else 0, ROUND=TL_DTYPE[x.dtype], TOKENS=tokens,
        OUT=_OUT, DEPTH=_DEPTH, enable_fp_fusion=False,
    )  # fmt: skip
    return (parts.sum(0) + y).to(y.dtype)
