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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.errors import KernelError
from fastadapt.ops import native, scratch
from fastadapt.ops.bits import Bits, Dense, Nf4
from fastadapt.ops.dispatch import Op
from fastadapt.ops.dropout import draw_seed, dropout_native, dropout_reference
from fastadapt.ops.nf4 import nf4_dequant_into, nf4_dequant_reference
from fastadapt.ops.precision import product_dtype

Fields = tuple[Any, ...]
Decode = Callable[[Bits, torch.dtype, torch.dtype], Tensor]
Drop = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]


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
    Raises KernelError for shapes that do not fit.
    """
    _check(x, a, b, bits)
    seed = draw_seed(x.device) if p > 0 else None
    args = (x, bias, a, b, scale, p, seed, compute, out, *fields(bits))
    y: Tensor = LowRankFunction.apply(*args)  # type: ignore[no-untyped-call]
    return y


class LowRankFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float,
        seed: Tensor | None, compute: torch.dtype, out: torch.dtype, *bits: Any,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        y, u = low_rank_fwd(rows, bias, a, b, scale, p, seed, compute, out, *bits)
        ctx.save_for_backward(x, u, seed, a, b, *bits[:_TENSORS])
        ctx.plain = (scale, p, compute, bits[_TENSORS:])
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], b.shape[0])  # type: ignore[no-any-return]

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
        dbias = gs.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_bias else None
        rest = (None,) * (5 + len(tensors) + len(plain))
        return (dx.view(x.shape) if need_x else None, dbias, da if need_a else None,
                db if need_b else None, *rest)  # fmt: skip


def low_rank_fwd_reference(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, compute: torch.dtype, out: torch.dtype, *bits: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(
        x, bias, a, b, scale, p, seed, compute, out, _bits(bits), _decode, dropout_reference
    )


def low_rank_bwd_reference(
    g: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, compute: torch.dtype, need_x: bool, need_a: bool, need_b: bool,
    *bits: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(
        g, x, u, a, b, scale, p, seed, compute, (need_x, need_a, need_b), _bits(bits),
        _decode, dropout_reference,
    )  # fmt: skip


def low_rank_fwd_native(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, compute: torch.dtype, out: torch.dtype, *bits: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(
        x, bias, a, b, scale, p, seed, compute, out, _bits(bits), _decode_native, dropout_native
    )


def low_rank_bwd_native(
    g: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, compute: torch.dtype, need_x: bool, need_a: bool, need_b: bool,
    *bits: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(
        g, x, u, a, b, scale, p, seed, compute, (need_x, need_a, need_b), _bits(bits),
        _decode_native, dropout_native,
    )  # fmt: skip


def why_not_low_rank_fwd_native(x: Tensor, *_: object) -> str | None:
    return native.why_not() if x.device.type == "cpu" else "x is not on a CPU"


why_not_low_rank_bwd_native = why_not_low_rank_fwd_native


def _forward(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, compute: torch.dtype, out: torch.dtype, bits: Bits | None,
    decode: Decode, drop: Drop,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    low = product_dtype(out, x.device)
    xd = x.to(low) if seed is None else drop(x, seed, p, low)
    u = xd @ a.to(low).t()
    y = u @ (b * scale).to(low).t()
    if bits is not None:
        y = _add_product(y, x, bits, compute, decode, transposed=True)
    if bias is not None:
        y += bias.to(y.dtype)
    return y.to(out), u


def _backward(
    g: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, compute: torch.dtype, need: tuple[bool, bool, bool], bits: Bits | None,
    decode: Decode, drop: Drop,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_x, need_a, need_b = need
    low = product_dtype(u.dtype, x.device)
    nothing = x.new_empty(0)
    gl = g.to(low)
    du = gl @ (b * scale).to(low) if need_x or need_a else nothing
    db = ((gl.t() @ u) * scale).to(b.dtype) if need_b else nothing
    da = nothing
    if need_a:
        xd = x.to(low) if seed is None else drop(x, seed, p, low)
        da = (du.t() @ xd).to(a.dtype)
    dx = nothing
    if need_x:
        dx = du @ a.to(low)
        if seed is not None:
            dx = drop(dx, seed, p, low)
        if bits is not None:
            dx = _add_product(dx, g, bits, compute, decode, transposed=False)
        dx = dx.to(x.dtype)
    return dx, da, db


def _add_product(
    y: Tensor, x: Tensor, bits: Bits, compute: torch.dtype, decode: Decode, *, transposed: bool
) -> Tensor:
    """y + x W^T (or x W): in place where y has the product's dtype."""
    math = product_dtype(compute, x.device)
    w = decode(bits, compute, math)
    w = w.t() if transposed else w
    if y.dtype == math:
        return y.addmm_(x.to(math), w)
    return y + (x.to(math) @ w).to(y.dtype)


def _decode(bits: Bits, compute: torch.dtype, math: torch.dtype) -> Tensor:
    """W (n, k), rounded to ``compute`` and held in ``math``."""
    if isinstance(bits, Dense):
        return bits.w.to(compute).to(math)
    return nf4_dequant_reference(*bits, compute).to(math)


def _decode_native(bits: Bits, compute: torch.dtype, math: torch.dtype) -> Tensor:
    """The same into this thread's scratch: a fresh 64 MB tensor costs more in page faults than
    in decoding (18 ms against 2 for 4096 x 4096)."""
    if isinstance(bits, Dense):
        if bits.w.dtype == math:
            return bits.w
        if bits.w.dtype == compute:
            return scratch.take(bits.shape, math).copy_(bits.w)
        return scratch.take(bits.shape, math).copy_(bits.w.to(compute))
    if bits.dtype == compute or bits.dtype == torch.float32:
        return nf4_dequant_into(bits._replace(dtype=compute), scratch.take(bits.shape, math))
    return _decode(bits, compute, math)


_TENSORS = 6


def fields(bits: Bits | None) -> Fields:
    """The flat form that the schemas take: six tensors (or None), four ints, a dtype."""
    if bits is None:
        return (None,) * _TENSORS + (0, 0, 0, 0, torch.float32)
    if isinstance(bits, Dense):
        return (bits.w, None, None, None, None, None, 0, 0, *bits.w.shape, bits.w.dtype)
    return tuple(bits)


def _bits(flat: Fields) -> Bits | None:
    if flat[0] is None:
        return None
    return Dense(flat[0]) if flat[1] is None else Nf4(*flat)


def _check(x: Tensor, a: Tensor, b: Tensor, bits: Bits | None) -> None:
    k, (r, n) = x.shape[-1], (a.shape[0], b.shape[0])
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != k or b.shape[1] != r:
        raise KernelError(
            f"low_rank: expected a (r, k={k}) and b (n, r), got a {tuple(a.shape)} and "
            f"b {tuple(b.shape)}"
        )
    if bits is not None and tuple(bits.shape) != (n, k):
        raise KernelError(f"low_rank: expected W (n={n}, k={k}), got {tuple(bits.shape)}")


_BITS = (
    "Tensor? w, Tensor? absmax, Tensor? code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? offset, int blocksize, int nested_blocksize, SymInt n, SymInt k, ScalarType dtype"
)
_PAIR = "Tensor a, Tensor b, float scale, float p, Tensor? seed, ScalarType compute"

low_rank_fwd = Op(
    "low_rank_fwd",
    "(Tensor x, Tensor? bias, Tensor a, Tensor b, float scale, float p, Tensor? seed, "
    f"ScalarType compute, ScalarType out, {_BITS}) -> (Tensor, Tensor)",
    low_rank_fwd_reference,
    native="fastadapt.ops.low_rank:low_rank_fwd_native",
)
low_rank_bwd = Op(
    "low_rank_bwd",
    f"(Tensor g, Tensor x, Tensor u, {_PAIR}, bool need_x, bool need_a, bool need_b, {_BITS}) "
    "-> (Tensor, Tensor, Tensor)",
    low_rank_bwd_reference,
    native="fastadapt.ops.low_rank:low_rank_bwd_native",
)
