# SPDX-License-Identifier: Apache-2.0
"""The channels of x through a block-diagonal matrix near the identity:  y = x + x diag(D_1 .. D_g).

    x: (m, k)  d: (g, s, s), repeated k / (g s) times  ->  (m, k)
    dx = dy + dy diag(D_1^T .. D_g^T)   dD_i = x_i^T dy_i

D is the rotation minus the identity: in half precision the diagonal of a small rotation would
round to 1, D does not. Blocks narrower than 32 are packed into wider ones with zeros between
them: measured on an AVX2 core, 512 x 576, blocks of 4: 1.4 ms as they are, 0.33 ms packed.

``apart`` > 1 is a factor of a butterfly: a block takes two runs of s / 2 neighbours, the second
apart s / 2 channels after the first, so that ``apart`` blocks share a segment of apart s channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.errors import KernelError
from fastadapt.ops.dispatch import Op
from fastadapt.ops.precision import compute_dtype, product_dtype

_WIDTH = 32


def rotate(x: Tensor, d: Tensor, apart: int = 1) -> Tensor:
    """See the module's first lines. x: (..., k); the result is in the dtype that a product with x
    is asked for (autocast's, or x's). Raises KernelError for blocks that do not fill k."""
    if d.dim() != 3 or d.shape[1] != d.shape[2] or x.shape[-1] % (d.shape[0] * d.shape[1]):
        raise KernelError(
            f"rotate: expected d (g, s, s) with k={x.shape[-1]} a multiple of g s, got "
            f"{tuple(d.shape)}"
        )
    if apart < 1 or (apart > 1 and (d.shape[1] % 2 or x.shape[-1] % (apart * d.shape[1]))):
        raise KernelError(
            f"rotate: expected apart=1, or s={d.shape[1]} even and k={x.shape[-1]} a multiple of "
            f"apart s, got apart={apart}"
        )
    y: Tensor = RotateFunction.apply(x, d, apart, compute_dtype(x))  # type: ignore[no-untyped-call]
    return y


def cayley(q: Tensor, terms: int | None = None) -> Tensor:
    """R - I of R = (I - Q) (I + Q)^-1, for skew-symmetric Q: (g, s, s) -> (g, s, s).

    terms: PEFT's truncated Neumann series instead, I + 2 Q + .. + 2 Q^(terms-2) + Q^(terms-1); it
    turns the other way. For half precision the solve and its result are float32, which LAPACK and
    cuSOLVER need."""
    if terms is None:
        q = q.float() if q.element_size() < 4 else q
        return CayleyFunction.apply(q)  # type: ignore[no-untyped-call,no-any-return]
    if terms < 2:
        return torch.zeros_like(q)
    if terms == 2:
        return 2 * q
    # Horner's rule; PEFT's series has a third power however short it is asked to be
    series = q
    for _ in range(max(terms, 4) - 2):
        series = torch.baddbmm(q, q, series, beta=2)
    return series


class CayleyFunction(torch.autograd.Function):
    """D = R - I = 2 (I + Q)^-1 - 2 I holds the inverse itself, so that backward solves nothing:
    dQ = -2 V^T dD V^T, V = (I + Q)^-1."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        # I + Q is never singular, so nothing is checked, which would make a GPU wait
        d: Tensor = torch.linalg.solve_ex(eye + q, -2 * q, left=False)[0]
        ctx.save_for_backward(d)
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (d,) = ctx.saved_tensors
        inverse = (d / 2 + torch.eye(d.shape[-1], dtype=d.dtype, device=d.device)).mT
        dq: Tensor = inverse @ g @ inverse
        return dq.mul_(-2)


class RotateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, apart: int, out: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, d)
        ctx.apart = apart
        y: Tensor = rotate_fwd(x, d, apart, out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, d = ctx.saved_tensors
        need_x, need_d = ctx.needs_input_grad[:2]
        dx, dd = rotate_bwd(g, x, d, ctx.apart, need_x, need_d)
        return dx if need_x else None, dd if need_d else None, None, None


def rotate_fwd_reference(x: Tensor, d: Tensor, apart: int, out: torch.dtype) -> Tensor:
    return _turned(x, d, apart, out)


def rotate_bwd_reference(
    g: Tensor, x: Tensor, d: Tensor, apart: int, need_x: bool, need_d: bool
) -> tuple[Tensor, Tensor]:
    """(dx in x's dtype, dD in d's); an empty tensor where none is needed."""
    # outputs of an op must not share memory: a nothing each
    dx, dd = x.new_empty(0), d.new_empty(0)
    if need_x:
        dx = _turned(g, d.transpose(1, 2), apart, x.dtype)
    if need_d:
        low = product_dtype(g.dtype, x.device)
        count, size = d.shape[:2]
        pack = _pack(count, size)
        shape = (-1, count // pack, pack * size)
        left, right = (
            _gathered(t.to(low), size, apart).reshape(shape).transpose(0, 1) for t in (x, g)
        )
        wide = torch.bmm(left.transpose(1, 2), right).view(-1, pack, size, pack, size)
        dd = wide.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(d.shape).to(d.dtype)
    return dx, dd


def _turned(x: Tensor, d: Tensor, apart: int, out: torch.dtype) -> Tensor:
    low, size = product_dtype(out, x.device), d.shape[1]
    blocks = _packed(d).to(low)
    held = _gathered(x.to(low), size, apart)
    y = held.clone(memory_format=torch.contiguous_format)
    rows = held.reshape(-1, *blocks.shape[:2]).transpose(0, 1)
    y.view(-1, *blocks.shape[:2]).transpose(0, 1).baddbmm_(rows, blocks)
    y = y if apart == 1 else y.view(-1, apart, 2, size // 2).transpose(1, 2).reshape(x.shape)
    return y.to(out)


def _gathered(x: Tensor, size: int, apart: int) -> Tensor:
    """The channels of each block side by side."""
    if apart == 1:
        return x
    return x.reshape(-1, 2, apart, size // 2).transpose(1, 2).reshape(x.shape)


def _pack(count: int, size: int) -> int:
    """How many blocks make one of at most 32 channels."""
    return max(p for p in range(1, max(_WIDTH // size, 1) + 1) if count % p == 0)


def _packed(d: Tensor) -> Tensor:
    count, size = d.shape[:2]
    pack = _pack(count, size)
    if pack == 1:
        return d
    wide = d.new_zeros(count // pack, pack, size, pack, size)
    wide.diagonal(dim1=1, dim2=3).copy_(d.view(-1, pack, size, size).permute(0, 2, 3, 1))
    return wide.view(count // pack, pack * size, pack * size)


rotate_fwd = Op(
    "rotate_fwd",
    "(Tensor x, Tensor d, int apart, ScalarType out) -> Tensor",
    rotate_fwd_reference,
    triton="fastadapt.kernels.rotate:rotate_fwd",
)
rotate_bwd = Op(
    "rotate_bwd",
    "(Tensor g, Tensor x, Tensor d, int apart, bool need_x, bool need_d) -> (Tensor, Tensor)",
    rotate_bwd_reference,
    triton="fastadapt.kernels.rotate:rotate_bwd",
)
