# SPDX-License-Identifier: Apache-2.0
"""y = x - (x A^T) B^T around the skinny products of ``low_rank``; its own kernel adds the low-rank
part to x on the way out, so that x is read twice and nothing else of its size is made.

    x, g: (m, k)  a: (r, k)  b: (k, r)  u: (m, r)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import why_not_here
from .low_rank import down, down_grad, up_grad
from .low_rank import why_not as why_not_skinny
from .nf4 import TL_DTYPE
from .tiles import REFLECT, rank_block


@triton.jit
def reflect_kernel(x, u, w, y, m, k, r, stride_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   RANKS: tl.constexpr):  # fmt: skip
    """y = x + u W, RANKS of the r products at a time; grid (row blocks, column blocks)."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here, inside = (rows < m)[:, None], (columns < k)[None, :]
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, r, RANKS):
        ranks = first + tl.arange(0, RANKS)
        used = ranks < r
        left = tl.load(u + rows[:, None] * r + ranks[None, :], mask=here & used[None, :],
                       other=0.0)  # fmt: skip
        right = tl.load(w + ranks[:, None] * k + columns[None, :], mask=used[:, None] & inside,
                        other=0.0)  # fmt: skip
        value = tl.dot(left, right, value, input_precision="ieee")
    own = tl.load(x + rows[:, None] * stride_x + columns[None, :], mask=here & inside, other=0.0)
    kind = y.dtype.element_ty
    value += own.to(u.dtype.element_ty).to(tl.float32)
    tl.store(y + rows[:, None] * k + columns[None, :], value.to(kind), mask=here & inside)


def reflect_fwd(x: Tensor, a: Tensor, b: Tensor, out: torch.dtype) -> tuple[Tensor, Tensor]:
    """y (m, k), contiguous, and u (m, r), both in ``out``."""
    u = down(x.to(out), a, 0.0, None, out)
    return _added(x, u, b.t().neg(), out), u


def reflect_bwd(
    g: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, need_x: bool, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, da and db, each in the dtype of what it is the gradient of; empty where not needed."""
    dx, da, db = (t.new_empty(0) for t in (x, a, b))
    g = g.to(u.dtype)
    du, back = up_grad(g, u, b, -1.0)
    if need_x:
        dx = _added(g, du, a, x.dtype)
    if need_a:
        da = down_grad(x.to(u.dtype), du, 0.0, None, a.dtype)
    return dx, da, back if need_b else db


def _added(x: Tensor, u: Tensor, w: Tensor, out: torch.dtype) -> Tensor:
    """x + u W in ``out``, the sum in fp32; x as u's dtype has it."""
    y = torch.empty(x.shape, dtype=out, device=x.device)
    if y.numel():
        rows = x if x.stride(1) == 1 else x.contiguous()
        (m, k), r = rows.shape, u.shape[1]
        size, step = REFLECT[u.itemsize]
        reflect_kernel[(triton.cdiv(m, size.rows), triton.cdiv(k, size.columns))](
            rows, u, w.to(u.dtype).contiguous(), y, m, k, r, rows.stride(0),
            RANKS=min(step, rank_block(r)), **size.launch(),
        )  # fmt: skip
    return y


def why_not_reflect_fwd(x: Tensor, a: Tensor, b: Tensor, out: torch.dtype) -> str | None:
    return _why_not(x, a, out)


def why_not_reflect_bwd(g: Tensor, x: Tensor, u: Tensor, a: Tensor, *_: object) -> str | None:
    return _why_not(x, a, u.dtype)


def _why_not(x: Tensor, a: Tensor, dtype: torch.dtype) -> str | None:
    if x.dtype not in TL_DTYPE:
        return f"x is {x.dtype}"
    return why_not_skinny(x.device, x.shape[-1], a.shape[0], dtype, False) or why_not_here(x.device)
