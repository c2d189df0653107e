# SPDX-License-Identifier: Apache-2.0
"""loss[t] = log(sum_v exp(x[t, v])) - x[t, label[t]],  0 where the label is ``ignore``.

    x: (rows, columns)  labels: (rows,)  ->  loss: (rows,), lse: (rows, 2), float32 (float64)
    dx = (exp(x - lse) - [v = label]) g[t], in x's dtype

The logarithm is kept as the largest logit and what is above it: one number would round at its size.
The logits are read as they are and their gradient is written once: no float32 copy of them, no
logarithms of all probabilities. Everything is computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.errors import KernelError
from fastadapt.ops import native
from fastadapt.ops.dispatch import Op


def cross_entropy(x: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """The loss of each row. Raises KernelError for shapes that do not fit, IndexError for a label
    that is no column."""
    if x.dim() != 2 or labels.shape != x.shape[:1]:
        raise KernelError(
            f"cross_entropy: expected x (rows, columns) and labels (rows,), got {tuple(x.shape)} "
            f"and {tuple(labels.shape)}"
        )
    if labels.device.type == "cpu" and labels.numel():
        low, high = torch.where(labels == ignore, 0, labels).aminmax()
        if low < 0 or high >= x.shape[1]:
            raise IndexError(f"Target {int(low if low < 0 else high)} is out of bounds.")
    loss: Tensor = CrossEntropyFunction.apply(x, labels, ignore)  # type: ignore[no-untyped-call]
    return loss


class CrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, ignore: int) -> Tensor:
        loss: Tensor
        loss, lse = cross_entropy_fwd(x, labels, ignore)
        ctx.save_for_backward(x, labels, lse)
        ctx.ignore = ignore
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, labels, lse = ctx.saved_tensors
        return cross_entropy_bwd(x, labels, lse, g.contiguous(), ctx.ignore), None, None


def cross_entropy_fwd_reference(x: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    top = wide.amax(1)
    above = (wide - top[:, None]).exp().sum(1).log()
    kept = labels != ignore
    picked = wide.gather(1, torch.where(kept, labels, 0)[:, None]).squeeze(1)
    return torch.where(kept, (top - picked) + above, 0.0), torch.stack([top, above], 1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy_bwd_reference(
    x: Tensor, labels: Tensor, lse: Tensor, g: Tensor, ignore: int
) -> Tensor:
    kept = labels != ignore
    dx = (_wide(x) - lse[:, :1] - lse[:, 1:]).exp()
    dx = dx.scatter_add(1, torch.where(kept, labels, 0)[:, None], dx.new_full((len(x), 1), -1.0))
    return torch.where(kept[:, None], dx * g[:, None], 0.0).to(x.dtype)


def cross_entropy_fwd_native(x: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    return native.cross_entropy_fwd(x, labels, ignore)


def cross_entropy_bwd_native(
    x: Tensor, labels: Tensor, lse: Tensor, g: Tensor, ignore: int
) -> Tensor:
    return native.cross_entropy_bwd(x, labels, lse, g, ignore)


def why_not_cross_entropy_fwd_native(x: Tensor, *_: object) -> str | None:
    if x.device.type != "cpu":
        return "x is not on a CPU"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}"
    reason = native.why_not()
    if reason is None and native.isa() < native.AVX512:
        return "this CPU has no AVX-512"
    return reason


why_not_cross_entropy_bwd_native = why_not_cross_entropy_fwd_native

cross_entropy_fwd = Op(
    "cross_entropy_fwd",
    "(Tensor x, Tensor labels, int ignore) -> (Tensor, Tensor)",
    cross_entropy_fwd_reference,
    native="fastadapt.ops.cross_entropy:cross_entropy_fwd_native",
)
cross_entropy_bwd = Op(
    "cross_entropy_bwd",
    "(Tensor x, Tensor labels, Tensor lse, Tensor g, int ignore) -> Tensor",
    cross_entropy_bwd_reference,
    native="fastadapt.ops.cross_entropy:cross_entropy_bwd_native",
)
