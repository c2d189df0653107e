# SPDX-License-Identifier: Apache-2.0
"""y += x W^T and dx += g W with W decoded in registers, for few tokens: W crosses the memory bus as
4 bits, where decoding it first costs 230 / m of the product's time on an H200 (computed).

    x: (m, k)  g: (m, n)  W: (n, k) packed  ->  (m, n), (m, k)

fp32 accumulation; a reduction that is split writes partial sums, added in a fixed order.

FASTADAPT_NF4_TABLE=pair asks for one look-up a byte instead of one an element: the codebook is then
rounded to the 16-bit type before it is scaled, an error of the size of that of rounding W. The
default, ``exact``, has bitsandbytes' values.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapt.errors import ConfigError

from .launch import splits
from .nf4 import TL_DTYPE, decode_tile, words
from .tiles import gemm


@triton.jit
def nf4_gemm_fwd_kernel(
    x, words, absmax, code, nested_absmax, nested_code, offset, parts, m, n, k, stride_x, depth,
    QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, TOKENS: tl.constexpr,
    OUT: tl.constexpr, DEPTH: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """parts[split] = x[:, chunk] W[:, chunk]^T; grid (n blocks, m blocks, splits).

    W is the left operand (y^T = W x^T), so that decoded values stay in registers."""
    row = tl.program_id(0) * OUT
    within = tl.minimum(tl.arange(0, OUT), n - 1 - row)
    rows = (row + tl.arange(0, OUT)).to(tl.int64)
    tokens = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    split = tl.program_id(2)
    # rows and tokens past the end repeat the last, which costs no mask, and are not stored
    token = tl.minimum(tokens, m - 1)
    acc = tl.zeros((OUT, TOKENS), tl.float32)
    first = split * depth * DEPTH
    for column in range(first, min(first + depth * DEPTH, k), DEPTH):
        w = decode_tile(words, absmax, code, nested_absmax, nested_code, offset,
                        row, within, column, k, QBLOCK, NESTED_BLOCK, DEPTH, ROUND,
                        PAIRS).to(ROUND)  # fmt: skip
        xt = tl.load(x + column + (token[None, :] * stride_x + tl.arange(0, DEPTH)[:, None]))
        acc = tl.dot(w, xt, acc, input_precision="ieee")
    place = (split.to(tl.int64) * m + tokens)[None, :] * n + rows[:, None]
    tl.store(parts + place, acc, mask=(rows < n)[:, None] & (tokens < m)[None, :])


@triton.jit
def nf4_gemm_bwd_kernel(
    g, words, absmax, code, nested_absmax, nested_code, offset, parts, m, n, k, stride_g, depth,
    QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, TOKENS: tl.constexpr,
    OUT: tl.constexpr, DEPTH: tl.constexpr, PAIRS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """parts[split] = g[:, chunk] W[chunk]; WHOLE: DEPTH divides n.
    grid (k blocks, m blocks, splits).

    For few tokens W^T g^T is computed: Hopper's tensor cores take at least 64 rows on the left."""
    FLIP: tl.constexpr = TOKENS < 64 and WHOLE and tl.float32 != ROUND
    column = tl.program_id(0) * OUT
    tokens = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    split = tl.program_id(2)
    token = tl.minimum(tokens, m - 1)
    acc = tl.zeros((OUT, TOKENS) if FLIP else (TOKENS, OUT), tl.float32)
    first = split * depth * DEPTH
    for row in range(first, min(first + depth * DEPTH, n), DEPTH):
        within = tl.arange(0, DEPTH)
        place = token[:, None] * stride_g + within[None, :]
        if WHOLE:
            tile = tl.load(g + row + place)
        else:
            tile = tl.load(g + row + place, mask=(within < n - row)[None, :], other=0.0)
            within = tl.minimum(within, n - 1 - row)
        w = decode_tile(words, absmax, code, nested_absmax, nested_code, offset,
                        row, within, column, k, QBLOCK, NESTED_BLOCK, OUT, ROUND,
                        PAIRS).to(ROUND)  # fmt: skip
        if FLIP:
            acc = tl.dot(tl.trans(w), tl.trans(tile), acc, input_precision="ieee")
        else:
            acc = tl.dot(tile, w, acc, input_precision="ieee")
    if FLIP:
        acc = tl.trans(acc)
    columns = column + tl.arange(0, OUT)
    place = (split.to(tl.int64) * m + tokens)[:, None] * k + columns[None, :]
    tl.store(parts + place, acc, mask=(tokens < m)[:, None])


def pair_table_wanted() -> bool:
    """What FASTADAPT_NF4_TABLE says; ConfigError where that is neither exact nor pair."""
    table = os.environ.get("FASTADAPT_NF4_TABLE", "exact")
    if table not in ("exact", "pair"):
        raise ConfigError(f"FASTADAPT_NF4_TABLE must be exact or pair, got {table!r}")
    return table == "pair"


def add_product(
    y: Tensor, x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor,
    nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    blocksize: int, nested_blocksize: int, n: int, k: int, dtype: torch.dtype, *, transposed: bool,
) -> Tensor:  # fmt: skip
    """y + x W^T (``transposed``) or y + x W, in y's dtype; W is rounded to x's dtype."""
    m = x.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out, inner = (n, k) if transposed else (k, n)
    pairs = pair_table_wanted() and x.itemsize == 2
    size = gemm(transposed, x.itemsize)
    tokens = 16 if m <= 16 else size.tokens
    tiles = triton.cdiv(out, size.out) * triton.cdiv(m, tokens)
    steps = triton.cdiv(inner, size.depth)
    depth = triton.cdiv(steps, splits(tiles, steps, x.device))
    parts = x.new_empty((triton.cdiv(steps, depth), m, out), dtype=torch.float32)
    nested = nested_absmax is not None
    kernel = nf4_gemm_fwd_kernel if transposed else nf4_gemm_bwd_kernel
    whole = {} if transposed else {"WHOLE": n % size.depth == 0}
    kernel[(triton.cdiv(out, size.out), triton.cdiv(m, tokens), parts.shape[0])](
        x, words(packed), absmax, code, nested_absmax if nested else code,
        nested_code if nested else code, offset if nested else code, parts, m, n, k, x.stride(0),
        depth, QBLOCK=blocksize, NESTED_BLOCK=nested_blocksize if nested else 0,
        ROUND=TL_DTYPE[x.dtype], TOKENS=tokens, PAIRS=pairs, **whole, **size.launch(),
    )  # fmt: skip
    return (parts.sum(0) + y).to(y.dtype)
