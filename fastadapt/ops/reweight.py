# SPDX-License-Identifier: Apache-2.0
"""y = x (W + U)^T + bias, U made from small parameters, and from W, and made again for backward.

    x: (..., k)  W, U: (n, k)  bias: (n,)  ->  (..., n)
    dx = g (W + U)   dU = g^T x, and from it the gradients of what ``update`` reads

For methods whose U is neither of a low rank nor made of something small times x. Saved for
backward: x alone, where autograd would keep every intermediate (n, k) matrix. dU is a third full
product beside those of a frozen layer; that is the floor of such a method. In half precision W + U
would round small updates away: there x U^T is a product of its own, which the one with W is added
into; dx, which is rounded anyway, takes the rounded sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.ops.low_rank import unviewed
from fastadapt.ops.precision import HALVES, compute_dtype, product_dtype

Read = Callable[[], Tensor]
Parameters = Callable[[], Sequence[Tensor]]


def reweight(
    x: Tensor, read: Read | None, update: Read, parameters: Parameters, bias: Tensor | None = None
) -> Tensor:
    """read() -> W, a constant; None for x U^T alone. update() -> U. parameters() -> the tensors
    that ``update`` reads and that may need a gradient, asked for anew in backward since wrappers of
    the model replace them. The result is in the dtype that a product with x is asked for."""
    out = compute_dtype(x)
    if torch.compiler.is_compiling():
        # the compiler decides itself what is made again
        y: Tensor = F.linear(x.to(out), update().to(out))
        y = y if read is None else F.linear(x.to(out), read().to(out)) + y
        return y if bias is None else y + bias.to(out)
    args = (x, bias, read, update, parameters, out, *parameters())
    return ReweightFunction.apply(*args)  # type: ignore[no-untyped-call,no-any-return]


class ReweightFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, read: Read | None, update: Read,
        parameters: Parameters, out: torch.dtype, *_: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x)
        ctx.read, ctx.update, ctx.parameters, ctx.out = read, update, parameters, out
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            low = product_dtype(out, x.device)
            rows, u = x.to(low).reshape(-1, x.shape[-1]), update().to(low)
            if read is None:
                y = rows @ u.t()
            elif low in HALVES:
                y = (rows @ u.t()).addmm_(rows, read().to(low).t())
            else:
                y = rows @ (read().to(low) + u).t()
            if bias is not None:
                y += bias.to(low)
            return unviewed(y.to(out), (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        low = product_dtype(ctx.out, x.device)
        need_x, need_bias, *needs = ctx.needs_input_grad[:2] + ctx.needs_input_grad[6:]
        parameters = ctx.parameters()
        wanted = [p for p, need in zip(parameters, needs, strict=True) if need]
        dx = dbias = None
        found: tuple[Tensor | None, ...] = ()
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                u = ctx.update()
            rows = g.to(low).reshape(-1, g.shape[-1])
            if need_x:
                total = u.detach() if ctx.read is None else ctx.read() + u.detach()
                dx = (rows @ total.to(low)).to(x.dtype).view(x.shape)
                del total
            if wanted:
                du = rows.t() @ x.to(low).reshape(-1, x.shape[-1])
                found = torch.autograd.grad(u, wanted, du.to(u.dtype), allow_unused=True)
            if need_bias:
                wide = torch.promote_types(rows.dtype, torch.float32)
                dbias = rows.sum(0, dtype=wide).to(ctx.bias_dtype)
        left = iter(found)
        grads = (next(left) if need else None for need in needs)
        return dx, dbias, None, None, None, None, *grads
