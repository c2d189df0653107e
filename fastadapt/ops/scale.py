# SPDX-License-Identifier: Apache-2.0
"""Each channel scaled and shifted:  y = v x + shift + rest.

    x, rest: (o, c, i)  v, shift: (c,)  ->  y: (o, c, i), in x's dtype
    dx = v g   dv = sum g x   dshift = sum g   drest = g, the sums over all but the channels

(IA)3 is v x. DoRA's magnitude is v x + shift: W x + bias comes in, and the bias is not scaled.
Products and sums are in fp32 (float64 for float64), rounded once. Saved for backward: v, and x
where v is trained. DoRA could do with y, which others may save as well, in the place of x; but then
an output that is changed in place (rotary embeddings, ReLU) would fail, and a magnitude of zero
would have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.errors import KernelError
from fastadapt.ops.dispatch import Op


def scale(
    x: Tensor, v: Tensor, *, axis: int = -1, shift: Tensor | None = None, rest: Tensor | None = None
) -> Tensor:
    """x, rest: any shape; v, shift: one value for each index of ``axis``. Raises KernelError for
    sizes that do not fit."""
    channels = x.shape[axis]
    if v.shape != (channels,) or (shift is not None and shift.shape != (channels,)):
        shown = None if shift is None else tuple(shift.shape)
        raise KernelError(
            f"scale: expected v and shift ({channels},), as axis {axis} of x {tuple(x.shape)}, got "
            f"v {tuple(v.shape)} and shift {shown}"
        )
    if rest is not None and rest.shape != x.shape:
        raise KernelError(f"scale: expected rest as x, {tuple(x.shape)}, got {tuple(rest.shape)}")
    args = (x, v, shift, rest, axis % x.dim())
    y: Tensor = ScaleFunction.apply(*args)  # type: ignore[no-untyped-call]
    return y


class ScaleFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, shift: Tensor | None, rest: Tensor | None, axis: int
    ) -> Tensor:
        ctx.save_for_backward(x if v.requires_grad else None, v)
        ctx.axis = axis
        ctx.dtypes = x.dtype, *(None if t is None else t.dtype for t in (shift, rest))
        y: Tensor = scale_fwd(x, v, shift, rest, axis)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, v = ctx.saved_tensors
        need_x, need_v, need_shift, need_rest, _ = ctx.needs_input_grad
        dtype, shift_dtype, rest_dtype = ctx.dtypes
        dx, dv, dshift = scale_bwd(g, x if need_v else None, v, ctx.axis, need_x, need_shift)
        return (
            dx.to(dtype) if need_x else None,
            dv.to(v.dtype) if need_v else None,
            dshift.to(shift_dtype) if need_shift else None,
            g.to(rest_dtype) if need_rest else None,
            None,
        )


def scale_fwd_reference(
    x: Tensor, v: Tensor, shift: Tensor | None, rest: Tensor | None, axis: int
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    column = (-1, *(1,) * (x.dim() - 1 - axis))
    y = x.to(wide, memory_format=torch.contiguous_format) * v.to(wide).view(column)
    if shift is not None:
        y += shift.to(wide).view(column)
    if rest is not None:
        y += rest.to(wide)
    return y.to(x.dtype, memory_format=torch.contiguous_format).contiguous()


def scale_bwd_reference(
    g: Tensor, x: Tensor | None, v: Tensor, axis: int, need_x: bool, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in g's dtype, dv, dshift, both in the dtype of the sums); x: None where dv is not
    needed."""
    kind = torch.promote_types(g.dtype, torch.float32)
    # outputs of an op must not share memory: a nothing each
    dx, dv, dshift = g.new_empty(0), g.new_empty(0, dtype=kind), g.new_empty(0, dtype=kind)
    wide, others = g.to(kind), [i for i in range(g.dim()) if i != axis]
    if need_x:
        factor = v.to(kind).view(-1, *(1,) * (g.dim() - 1 - axis))
        dx = (wide * factor).to(g.dtype).contiguous()
    if x is not None:
        product = wide * x.to(kind)
        dv = product.sum(others) if others else product
    if need_shift:
        dshift = wide.sum(others) if others else wide.clone()
    return dx, dv, dshift


scale_fwd = Op(
    "scale_fwd",
    "(Tensor x, Tensor v, Tensor? shift, Tensor? rest, int axis) -> Tensor",
    scale_fwd_reference,
    triton="fastadapt.kernels.scale:scale_fwd",
)
scale_bwd = Op(
    "scale_bwd",
    "(Tensor g, Tensor? x, Tensor v, int axis, bool need_x, bool need_shift) "
    "-> (Tensor, Tensor, Tensor)",
    scale_bwd_reference,
    triton="fastadapt.kernels.scale:scale_bwd",
)
