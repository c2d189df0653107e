# SPDX-License-Identifier: Apache-2.0
"""y = v x + shift + rest for each channel, and its gradients in one pass over g.

    x, g, rest: (o, c, i) as o i rows of c columns  v, shift: (c,)

Products and sums in fp32; the sums over rows are cut in parts, which are added in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import splits, why_not_here

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# FLAT: channels lie side by side; else rows do
LAUNCH = {
    True: {"ROWS": 32, "COLUMNS": 128, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True},
    False: {"ROWS": 64, "COLUMNS": 16, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True},
}


@triton.jit
def _place(rows, columns, c, inner, FLAT: tl.constexpr):
    wide = rows.to(tl.int64)
    if FLAT:
        return wide[:, None] * c + columns[None, :]
    return ((wide // inner)[:, None] * c + columns[None, :]) * inner + (wide % inner)[:, None]


@triton.jit
def scale_fwd_kernel(x, v, shift, rest, y, rows, c, inner, SHIFT: tl.constexpr, REST: tl.constexpr,
                     FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """grid (row blocks, column blocks)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < c
    mask = (row < rows)[:, None] & inside[None, :]
    place = _place(row, column, c, inner, FLAT)
    factor = tl.load(v + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
    if SHIFT:
        value += tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if REST:
        value += tl.load(rest + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def scale_bwd_kernel(g, x, v, dx, dv_parts, dshift_parts, rows, c, inner, depth,
                     DX: tl.constexpr, DV: tl.constexpr, DSHIFT: tl.constexpr, FLAT: tl.constexpr,
                     ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """grid (column blocks, splits)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    inside = column < c
    factor = tl.load(v + column, mask=inside, other=0.0).to(tl.float32)
    dv = tl.zeros((ROWS, COLUMNS), tl.float32)
    dshift = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = split * depth * ROWS
    for start in range(first, min(first + depth * ROWS, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        place = _place(row, column, c, inner, FLAT)
        grad = tl.load(g + place, mask=mask, other=0.0).to(tl.float32)
        if DX:
            tl.store(dx + place, (grad * factor[None, :]).to(dx.dtype.element_ty), mask=mask)
        if DV:
            dv += grad * tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        if DSHIFT:
            dshift += grad
    at = split.to(tl.int64) * c + column
    if DV:
        tl.store(dv_parts + at, tl.sum(dv, 0), mask=inside)
    if DSHIFT:
        tl.store(dshift_parts + at, tl.sum(dshift, 0), mask=inside)


def scale_fwd(x: Tensor, v: Tensor, shift: Tensor | None, rest: Tensor | None, axis: int) -> Tensor:
    """-> y, contiguous, in x's dtype."""
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        rows, c, inner = _sizes(x, axis)
        launch = LAUNCH[inner == 1]
        grid = (triton.cdiv(rows, launch["ROWS"]), triton.cdiv(c, launch["COLUMNS"]))
        scale_fwd_kernel[grid](
            x, v.contiguous(), x if shift is None else shift.contiguous(),
            x if rest is None else rest.contiguous(), y, rows, c, inner,
            SHIFT=shift is not None, REST=rest is not None, FLAT=inner == 1, **launch,
        )  # fmt: skip
    return y


def scale_bwd(
    g: Tensor, x: Tensor | None, v: Tensor, axis: int, need_x: bool, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dv, dshift); x: None where dv is not needed."""
    g, need_v = g.contiguous(), x is not None
    rows, c, inner = _sizes(g, axis)
    dx = g.new_empty(g.shape if need_x else 0)
    if g.numel() == 0:
        dv, dshift = (
            g.new_zeros(c if need else 0, dtype=torch.float32) for need in (need_v, need_shift)
        )
        return dx, dv, dshift
    launch = LAUNCH[inner == 1]
    tiles, steps = triton.cdiv(c, launch["COLUMNS"]), triton.cdiv(rows, launch["ROWS"])
    depth = triton.cdiv(steps, splits(tiles, steps, g.device))
    count = triton.cdiv(steps, depth)
    dv, dshift = (
        g.new_empty((count, c) if need else (0, 0), dtype=torch.float32)
        for need in (need_v, need_shift)
    )
    scale_bwd_kernel[(tiles, count)](
        g, g if x is None else x.contiguous(), v.contiguous(), dx, dv, dshift, rows, c, inner,
        depth, DX=need_x, DV=need_v, DSHIFT=need_shift, FLAT=inner == 1, **launch,
    )  # fmt: skip
    return dx, dv.sum(0), dshift.sum(0)


def _sizes(x: Tensor, axis: int) -> tuple[int, int, int]:
    """(rows, channels, how many indices stand after the channels)."""
    c, inner = x.shape[axis], math.prod(x.shape[axis + 1 :])
    return x.numel() // c if c else 0, c, inner


def why_not_scale_fwd(x: Tensor, v: Tensor, *_: object) -> str | None:
    return _why_not(x, v)


def why_not_scale_bwd(g: Tensor, x: object, v: Tensor, *_: object) -> str | None:
    return _why_not(g, v)


def _why_not(x: Tensor, v: Tensor) -> str | None:
    for name, dtype in (("x", x.dtype), ("v", v.dtype)):
        if dtype not in DTYPES:
            return f"{name} is {dtype}"
    return why_not_here(x.device)
