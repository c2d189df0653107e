# SPDX-License-Identifier: Apache-2.0
"""y = x W'^T where W' is made from the frozen W and small parameters, and made again for backward.

    x: (..., k)  make() -> W': (n, k)  ->  (..., n)
    dx = g W'   dW' = g^T x, and from it the gradients of what ``make`` reads

For methods whose W' is neither W plus a low rank nor W times something small. Saved for backward:
x alone, where autograd would keep every intermediate (n, k) matrix. dW' is a third full product
beside those of a frozen layer; that is the floor of such a method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.ops.precision import compute_dtype, product_dtype


def reweight(x: Tensor, make: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """parameters: all tensors that need a gradient and that ``make`` reads."""
    out = compute_dtype(x)
    if torch.compiler.is_compiling():
        # the compiler decides itself what is made again
        return F.linear(x.to(out), make().to(out))
    y: Tensor = ReweightFunction.apply(x, make, out, *parameters)  # type: ignore[no-untyped-call]
    return y


class ReweightFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, make: Callable[[], Tensor], out: torch.dtype, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.make, ctx.out, ctx.parameters = make, out, parameters
        with torch.autocast(x.device.type, enabled=False):
            low = product_dtype(out, x.device)
            return F.linear(x.to(low), make().to(out).to(low)).to(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        low = product_dtype(ctx.out, x.device)
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        wanted = [p for p, need in zip(ctx.parameters, needs, strict=True) if need]
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                w = ctx.make()
            g = g.to(low)
            dx = (g @ w.detach().to(ctx.out).to(low)).to(x.dtype) if need_x else None
            found: tuple[Tensor, ...] = ()
            if wanted:
                dw = g.flatten(0, -2).t() @ x.to(low).flatten(0, -2)
                found = torch.autograd.grad(w, wanted, dw.to(w.dtype))
        left = iter(found)
        return dx, None, None, *(next(left) if need else None for need in needs)
