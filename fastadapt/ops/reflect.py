# SPDX-License-Identifier: Apache-2.0
"""The channels of x through the identity less a low-rank product:  y = x - (x A^T) B^T.

    x: (m, k)  a: (r, k)  b: (k, r)  ->  (m, k)
    u = x A^T   dx = g + du A   du = -g B   da = du^T x   db = -g^T u

A chain of r Householder reflections has this form (compact WY: A = U^T, B = U T). x is read and
added once, in the product's own precision. Saved for backward: x and u.
Source: Bischof and Van Loan, The WY representation for products of Householder matrices (1987).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.errors import KernelError
from fastadapt.ops.dispatch import Op
from fastadapt.ops.low_rank import unviewed
from fastadapt.ops.precision import compute_dtype, product_dtype


def reflect(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """See the module's first lines. x: (..., k); the result is in the dtype that a product with x
    is asked for (autocast's, or x's). Raises KernelError for shapes that do not fit."""
    k = x.shape[-1]
    if a.dim() != 2 or a.shape[1] != k or b.shape != (k, a.shape[0]):
        raise KernelError(
            f"reflect: expected a (r, k={k}) and b (k={k}, r), got a {tuple(a.shape)} and "
            f"b {tuple(b.shape)}"
        )
    y: Tensor = ReflectFunction.apply(x, a, b, compute_dtype(x))  # type: ignore[no-untyped-call]
    return y


class ReflectFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, out: torch.dtype) -> Tensor:
        y, u = reflect_fwd(x.reshape(-1, x.shape[-1]), a, b, out)
        ctx.save_for_backward(x, u, a, b)
        return unviewed(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, u, a, b = ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        rows, gs = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        dx, da, db = reflect_bwd(gs, rows, u, a, b, need_x, need_a, need_b)
        return (dx.view(x.shape) if need_x else None, da if need_a else None,
                db if need_b else None, None)  # fmt: skip


def reflect_fwd_reference(
    x: Tensor, a: Tensor, b: Tensor, out: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y (m, k) in ``out``, u (m, r) in the dtype of the product."""
    low = product_dtype(out, x.device)
    rows = x.to(low)
    u = rows @ a.to(low).t()
    return torch.addmm(rows, u, b.to(low).t(), alpha=-1).to(out), u


def reflect_bwd_reference(
    g: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, need_x: bool, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, da and db, each in the dtype of what it is the gradient of; empty where not needed."""
    # outputs of an op must not share memory: a nothing each
    dx, da, db = (t.new_empty(0) for t in (x, a, b))
    grad = g.to(u.dtype)
    if need_x or need_a:
        back = grad @ b.to(u.dtype)
    if need_x:
        dx = torch.addmm(grad, back, a.to(u.dtype), alpha=-1).to(x.dtype)
    if need_a:
        da = (back.t() @ x.to(u.dtype)).neg_().to(a.dtype)
    if need_b:
        db = (grad.t() @ u).neg_().to(b.dtype)
    return dx, da, db


reflect_fwd = Op(
    "reflect_fwd",
    "(Tensor x, Tensor a, Tensor b, ScalarType out) -> (Tensor, Tensor)",
    reflect_fwd_reference,
    triton="fastadapt.kernels.reflect:reflect_fwd",
)
reflect_bwd = Op(
    "reflect_bwd",
    "(Tensor g, Tensor x, Tensor u, Tensor a, Tensor b, bool need_x, bool need_a, bool need_b) "
    "-> (Tensor, Tensor, Tensor)",
    reflect_bwd_reference,
    triton="fastadapt.kernels.reflect:reflect_bwd",
)
