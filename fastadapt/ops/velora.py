# SPDX-License-Identifier: Apache-2.0
"""h = x A^T whose backward has only a projection of x.

    x: (.., k) padded to (m, groups, d)  e: (d,)  a: (r, k)  ->  (.., r)
    saved: p = x e, (m, groups);  da = g^T (scale p e^T);  dx = g A

No other implementation: both products are plain ones, and what counts is what is not kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def velora_linear(x: Tensor, a: Tensor, e: Tensor, groups: int, scale: float) -> Tensor:
    """x A^T; see the module."""
    h: Tensor = VeloraFunction.apply(x, a, e, groups, scale)  # type: ignore[no-untyped-call]
    return h


def grouped(x: Tensor, groups: int) -> Tensor:
    """(m, groups, d), zeros behind the last feature."""
    d = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * d - x.shape[-1])).reshape(-1, groups, d)


class VeloraFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, e: Tensor, groups: int, scale: float) -> Tensor:
        e = e.to(x.dtype)
        ctx.save_for_backward(grouped(x, groups) @ e, a, e)
        ctx.scale, ctx.shape, ctx.dtype = scale, tuple(x.shape), x.dtype
        return F.linear(x, a.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        p, a, e = ctx.saved_tensors
        g = g.reshape(-1, g.shape[-1])
        dx = da = None
        if ctx.needs_input_grad[0]:
            dx = (g @ a.to(g.dtype)).reshape(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            again = (p.unsqueeze(-1) * e).flatten(1)[:, : a.shape[1]] * ctx.scale
            da = (g.t() @ again.to(g.dtype)).to(a.dtype)
        return dx, da, None, None, None
