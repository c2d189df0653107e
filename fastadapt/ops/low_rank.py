# SPDX-License-Identifier: Apache-2.0
"""y = x W^T + bias + s (drop(x) A^T) B^T  over a frozen Dense or 4-bit W, or without W.

    x: (m, k)  W: (n, k)  a: (r, k)  b: (n, r)  bias: (n,)  ->  y: (m, n), u = drop(x) A^T: (m, r)
    dx = g W + drop'(du A)   du = s g B   da = du^T drop(x)   db = s g^T u

Saved for backward: x and u. W is decoded again, and the mask is made again from its seed.
The low-rank part is written first and the base product is added into it (beta = 1): no clone,
no scale, no separate add. Products accumulate in fp32 (float64 for float64).
Source: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.errors import KernelError
from fastadapt.ops import native
from fastadapt.ops.bits import FLAT_TENSORS, Bits, Nf4, flatten, unflatten, why_not_whole
from fastadapt.ops.dispatch import Op
from fastadapt.ops.dropout import check_p, draw_seed
from fastadapt.ops.low_rank_native import (
    NativeLowRankFunction,
    direct,
    one_call,
    why_not_one_call,
)
from fastadapt.ops.low_rank_steps import NATIVE, REFERENCE, Steps, of_the_layer, triton_steps
from fastadapt.ops.precision import product_dtype


def low_rank(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    bits: Bits | None = None,
    bias: Tensor | None = None,
    p: float = 0.0,
    compute: torch.dtype,
    out: torch.dtype,
) -> Tensor:
    """The adapted layer, or its low-rank part alone when ``bits`` is None.

    x:       (..., k) -> (..., n)
    p:       dropout on the low-rank part's input, drawn from torch's generator
    compute: the dtype the base product is asked for (``bits`` decode to it)
    out:     the dtype of the result and of the low-rank part
    Raises KernelError for shapes that do not fit and for a p that ``check_p`` refuses.
    """
    flat = flatten(bits)
    straight = direct(x, bias, a, b, p, compute, out, flat)
    if not straight:
        check_low_rank(x, a, b, bits, bias)
    check_p(p)
    seed = draw_seed(x.device) if p > 0 else None
    y: Tensor
    if not straight:
        args = (x, bias, a, b, scale, p, seed, compute, out, *flat)
        y = LowRankFunction.apply(*args)  # type: ignore[no-untyped-call]
        return y
    try:
        y = NativeLowRankFunction.apply(x, bias, a, b, scale, p, seed, flat)  # type: ignore[no-untyped-call]
    except RuntimeError:
        check_low_rank(x, a, b, bits, bias)
        raise
    return y


class LowRankFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float,
        seed: Tensor | None, compute: torch.dtype, out: torch.dtype, *bits: Any,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        y, u = low_rank_fwd(rows, bias, a, b, scale, p, seed, compute, out, *bits)
        ctx.save_for_backward(x, u, seed, a, b, *bits[:FLAT_TENSORS])
        ctx.plain = (scale, p, compute, bits[FLAT_TENSORS:])
        ctx.bias_dtype = None if bias is None else bias.dtype
        return unviewed(y, (*x.shape[:-1], b.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, u, seed, a, b, *tensors = ctx.saved_tensors
        scale, p, compute, plain = ctx.plain
        need_x, need_bias, need_a, need_b = ctx.needs_input_grad[:4]
        rows, gs = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        dx, da, db = low_rank_bwd(
            gs, rows, u, a, b, scale, p, seed, compute, need_x, need_a, need_b, *tensors, *plain
        )
        wide = torch.promote_types(g.dtype, torch.float32)
        dbias = gs.sum(0, dtype=wide).to(ctx.bias_dtype) if need_bias else None
        rest = (None,) * (5 + len(tensors) + len(plain))
        return (dx.view(x.shape) if need_x else None, dbias, da if need_a else None,
                db if need_b else None, *rest)  # fmt: skip


def low_rank_fwd_reference(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward(REFERENCE, *args)


def low_rank_bwd_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(REFERENCE, *args)


def low_rank_fwd_native(*args: Any) -> tuple[Tensor, Tensor]:
    x, *_, p, _, compute, out = args[:9]
    if why_not_one_call(x, p, compute, out, args[9:]) is None:
        return one_call(*args[:7], *args[9:])
    return _forward(NATIVE, *args)


def low_rank_bwd_native(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, x, u, _, _, _, p, _, compute = args[:9]
    if why_not_one_call(x, p, compute, u.dtype, args[12:]) is None:
        return native.low_rank_bwd(*args[:8], *args[9:])
    return _backward(NATIVE, *args)


def low_rank_fwd_triton(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward(triton_steps(), *args)


def low_rank_bwd_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(triton_steps(), *args)


def why_not_low_rank_fwd_native(x: Tensor, *_: object) -> str | None:
    return native.why_not() if x.device.type == "cpu" else "x is not on a CPU"


why_not_low_rank_bwd_native = why_not_low_rank_fwd_native


def why_not_low_rank_fwd_triton(x: Tensor, bias: object, a: Tensor, *rest: Any) -> str | None:
    out = rest[5]
    return why_not_triton(x, a, out, rest[2] > 0)


def why_not_low_rank_bwd_triton(
    g: Tensor, x: Tensor, u: Tensor, a: Tensor, *rest: Any
) -> str | None:
    return why_not_triton(x, a, u.dtype, rest[2] > 0)


@cache
def _kernels() -> Any:
    """The module of the skinny kernels, or why there is none; a failed import is slow, and kept."""
    try:
        return import_module("fastadapt.kernels.low_rank")
    except Exception as error:  # a broken triton fails in ways of its own
        return f"fastadapt.kernels cannot be imported ({type(error).__name__}: {error})"


def why_not_triton(x: Tensor, a: Tensor, dtype: torch.dtype, drops: bool) -> str | None:
    """Why the skinny kernels cannot serve this branch."""
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    reason: str | None = kernels.why_not(x.device, x.shape[-1], a.shape[0], dtype, drops)
    return reason


def _forward(
    steps: Steps, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, compute: torch.dtype, out: torch.dtype, *flat: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    low, bits = product_dtype(out, x.device), unflatten(flat)
    u = steps.down(x, a, p, seed, low)
    y = u @ (b * scale).to(low).t()
    own = of_the_layer(x, bits, bias, compute)
    if own is not None:
        return own.add_(y).to(out), u
    if bits is not None:
        y = steps.product(y, x, bits, compute, True)
    if bias is not None:
        y += bias.to(y.dtype)
    return y.to(out), u


def _backward(
    steps: Steps, g: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, compute: torch.dtype, need_x: bool, need_a: bool, need_b: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    low, bits = product_dtype(u.dtype, x.device), unflatten(flat)
    # outputs of an op must not share memory: a nothing each
    dx, da, nothing = (x.new_empty(0) for _ in range(3))
    if need_x or need_a or need_b:
        du, db = steps.up_grad(g.to(low), u, b, scale)
    if need_a:
        da = steps.down_grad(x, du, p, seed, a.dtype)
    if need_x:
        dx = steps.input_grad(du, a, p, seed)
        if bits is not None:
            dx = steps.product(dx, g, bits, compute, False)
        dx = dx.to(x.dtype)
    return dx, da, db if need_b else nothing


def unviewed(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y in another shape, not counted as a view of it: autograd forbids changing in place a view
    that was made inside a Function, and a layer's output may be changed in place."""
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, shape)
    return shaped


def check_low_rank(x: Tensor, a: Tensor, b: Tensor, bits: Bits | None, bias: Tensor | None) -> None:
    """Raise KernelError where the shapes do not fit."""
    k, (r, n) = x.shape[-1], (a.shape[0], b.shape[0])
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != k or b.shape[1] != r:
        raise KernelError(
            f"low_rank: expected a (r, k={k}) and b (n, r), got a {tuple(a.shape)} and "
            f"b {tuple(b.shape)}"
        )
    if bits is not None and tuple(bits.shape) != (n, k):
        raise KernelError(f"low_rank: expected W (n={n}, k={k}), got {tuple(bits.shape)}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise KernelError(f"low_rank: expected bias (n={n},), got {tuple(bias.shape)}")
    held = (a, b) if bits is None else (a, b, bits)
    if any(t.device != x.device for t in held):
        devices = [str(t.device) for t in held]
        raise KernelError(
            f"low_rank: expected a, b and W on x's device {x.device}, got {devices}: move the "
            "layer or its input"
        )
    reason = why_not_whole(bits) if isinstance(bits, Nf4) else None
    if reason is not None:
        raise KernelError(f"low_rank: {reason}")


BITS = (
    "Tensor? w, Tensor? absmax, Tensor? code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? offset, int blocksize, int nested_blocksize, SymInt n, SymInt k, ScalarType dtype"
)
_PAIR = "Tensor a, Tensor b, float scale, float p, Tensor? seed, ScalarType compute"

low_rank_fwd = Op(
    "low_rank_fwd",
    "(Tensor x, Tensor? bias, Tensor a, Tensor b, float scale, float p, Tensor? seed, "
    f"ScalarType compute, ScalarType out, {BITS}) -> (Tensor, Tensor)",
    low_rank_fwd_reference,
    triton="fastadapt.ops.low_rank:low_rank_fwd_triton",
    native="fastadapt.ops.low_rank:low_rank_fwd_native",
)
low_rank_bwd = Op(
    "low_rank_bwd",
    f"(Tensor g, Tensor x, Tensor u, {_PAIR}, bool need_x, bool need_a, bool need_b, {BITS}) "
    "-> (Tensor, Tensor, Tensor)",
    low_rank_bwd_reference,
    triton="fastadapt.ops.low_rank:low_rank_bwd_triton",
    native="fastadapt.ops.low_rank:low_rank_bwd_native",
)
