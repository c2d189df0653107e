# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same x, each with its own low-rank adapter, as one op: q, k and v of an
attention, gate and up of an MLP.

    y_i = x W_i^T + bias_i + s_i (drop_i(x) A_i^T) B_i^T       i < g
    x: (m, k)  W_i: (n_i, k)  a_i: (r_i, k)  b_i: (n_i, r_i)  bias_i: (n_i,)  ->  y_i: (m, n_i)
    dx = sum_i  g_i W_i + drop_i'(du_i A_i)   du_i = s_i g_i B_i   da_i = du_i^T drop_i(x)
    db_i = s_i g_i^T u_i

Each adapter has a mask of its own, drawn in the order of the layers, as when they are called one by
one. Without dropout the A of all are one matrix, so that x is read once for u, for da and for dx.
Saved for backward: x and u (m, sum r_i). dx is added up in one buffer.
Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.errors import KernelError
from fastadapt.ops import native
from fastadapt.ops.bits import FLAT_TENSORS, Bits, flatten
from fastadapt.ops.dispatch import Op
from fastadapt.ops.dropout import check_p, draw_seed
from fastadapt.ops.low_rank import check_low_rank, unviewed, why_not_triton
from fastadapt.ops.low_rank_group_steps import (
    as_stored,
    backward,
    backward_in_calls,
    decoded_together,
    forward,
    forward_in_calls,
)
from fastadapt.ops.low_rank_steps import NATIVE, REFERENCE, triton_steps


class Member(NamedTuple):
    """One layer of the group: its weight and bias, a (r, k), b (n, r), the scale s, the dropout p
    on the low-rank part's input."""

    bits: Bits
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    p: float


def low_rank_group(
    x: Tensor, members: Sequence[Member], *, compute: torch.dtype, out: torch.dtype
) -> tuple[Tensor, ...]:
    """x: (.., k) -> (.., n_i) for each member; ``compute`` and ``out`` as in ``low_rank``.

    An output that gets no gradient costs nothing in backward. Raises KernelError for no members,
    shapes that do not fit, weights that decode to different dtypes, a p that ``check_p`` refuses.
    """
    if not members:
        raise KernelError("low_rank_group: expected one layer at least, got none")
    for member in members:
        check_low_rank(x, member.a, member.b, member.bits, member.bias)
        check_p(member.p)
    dtypes = {member.bits.dtype for member in members}
    if len(dtypes) > 1:
        raise KernelError(
            f"low_rank_group: expected weights of one dtype, got {sorted(map(str, dtypes))}: call "
            "low_rank for each"
        )
    drawn = [draw_seed(x.device) for member in members if member.p > 0]
    flat = [flatten(member.bits) for member in members]
    ys: tuple[Tensor, ...] = LowRankGroupFunction.apply(  # type: ignore[no-untyped-call]
        x, [v.scale for v in members], [v.p for v in members],
        torch.cat(drawn) if drawn else None, compute, out,
        [size for v in flat for size in v[FLAT_TENSORS:-1]], flat[0][-1],
        *(v.bias for v in members), *(v.a for v in members), *(v.b for v in members),
        *(t for v in flat for t in v[:FLAT_TENSORS]),
    )  # fmt: skip
    return ys


class LowRankGroupFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: list[float], p: list[float], seeds: Tensor | None,
        compute: torch.dtype, out: torch.dtype, sizes: list[int], dtype: torch.dtype, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        bias, a, b, w = _parted(rest, len(scale))
        rows = x.reshape(-1, x.shape[-1])
        u, *ys = low_rank_group_fwd(
            rows, bias, a, b, scale, p, seeds, compute, out, w, sizes, dtype
        )
        ctx.save_for_backward(x, u, seeds, *a, *b, *w)
        ctx.plain = (scale, p, compute, sizes, dtype)
        ctx.bias_dtypes = [None if v is None else v.dtype for v in bias]
        return tuple(unviewed(y, (*x.shape[:-1], v.shape[0])) for y, v in zip(ys, b, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Any, ...]:
        x, u, seeds, *rest = ctx.saved_tensors
        scale, p, compute, sizes, dtype = ctx.plain
        count = len(scale)
        a, b, w = rest[:count], rest[count : 2 * count], rest[2 * count :]
        asked = ctx.needs_input_grad[_LEADING : _LEADING + 3 * count]
        need_x, needs = ctx.needs_input_grad[0], list(asked[count:])
        flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in gs]
        dx, *grads = low_rank_group_bwd(
            flat, x.reshape(-1, x.shape[-1]), u, a, b, scale, p, seeds, compute, need_x, needs, w,
            sizes, dtype,
        )  # fmt: skip
        biases = [
            _summed(g, kind) if need else None
            for g, kind, need in zip(flat, ctx.bias_dtypes, asked, strict=False)
        ]
        found = [v if need else None for v, need in zip(grads, needs, strict=True)]
        return (
            dx.view(x.shape) if need_x else None, *(None,) * (_LEADING - 1), *biases, *found,
            *(None,) * len(w),
        )  # fmt: skip


_LEADING = 8
"""How many arguments of the Function stand before the tensors of the members."""


def _parted(rest: tuple[Any, ...], count: int) -> tuple[list[Any], ...]:
    """The biases, a, b, and the tensors of the weights."""
    ends = (0, count, 2 * count, 3 * count, len(rest))
    return tuple(list(rest[i:j]) for i, j in pairwise(ends))


def _summed(g: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if g is None:
        return None
    return g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(dtype)


def low_rank_group_fwd_reference(*args: Any) -> list[Tensor]:
    return forward(REFERENCE, as_stored, *args)


def low_rank_group_bwd_reference(*args: Any) -> list[Tensor]:
    return backward(REFERENCE, as_stored, *args)


def low_rank_group_fwd_native(*args: Any) -> list[Tensor]:
    return forward_in_calls(*args) or forward(NATIVE, as_stored, *args)


def low_rank_group_bwd_native(*args: Any) -> list[Tensor]:
    return backward_in_calls(*args) or backward(NATIVE, as_stored, *args)


def low_rank_group_fwd_triton(*args: Any) -> list[Tensor]:
    return forward(triton_steps(), decoded_together(), *args)


def low_rank_group_bwd_triton(*args: Any) -> list[Tensor]:
    return backward(triton_steps(), decoded_together(), *args)


def why_not_low_rank_group_fwd_native(x: Tensor, *_: object) -> str | None:
    return native.why_not() if x.device.type == "cpu" else "x is not on a CPU"


def why_not_low_rank_group_bwd_native(g: object, x: Tensor, *_: object) -> str | None:
    return why_not_low_rank_group_fwd_native(x)


def why_not_low_rank_group_fwd_triton(
    x: Tensor, bias: object, a: list[Tensor], b: object, scale: object, p: list[float], *rest: Any
) -> str | None:
    return _why_not_triton(x, a, p, rest[2])


def why_not_low_rank_group_bwd_triton(
    g: object, x: Tensor, u: Tensor, a: list[Tensor], b: object, scale: object, p: list[float],
    *rest: Any,
) -> str | None:  # fmt: skip
    return _why_not_triton(x, a, p, u.dtype)


def _why_not_triton(x: Tensor, a: list[Tensor], p: list[float], out: torch.dtype) -> str | None:
    reasons = (why_not_triton(x, v, out, q > 0) for v, q in zip(a, p, strict=True))
    return next(filter(None, reasons), None)


_PAIRS = "Tensor[] a, Tensor[] b, float[] scale, float[] p, Tensor? seeds, ScalarType compute, "
_BITS = "Tensor?[] w, SymInt[] sizes, ScalarType dtype"

low_rank_group_fwd = Op(
    "low_rank_group_fwd",
    f"(Tensor x, Tensor?[] bias, {_PAIRS}ScalarType out, {_BITS}) -> Tensor[]",
    low_rank_group_fwd_reference,
    triton="fastadapt.ops.low_rank_group:low_rank_group_fwd_triton",
    native="fastadapt.ops.low_rank_group:low_rank_group_fwd_native",
)
low_rank_group_bwd = Op(
    "low_rank_group_bwd",
    f"(Tensor?[] g, Tensor x, Tensor u, {_PAIRS}bool need_x, bool[] needs, {_BITS}) -> Tensor[]",
    low_rank_group_bwd_reference,
    triton="fastadapt.ops.low_rank_group:low_rank_group_bwd_triton",
    native="fastadapt.ops.low_rank_group:low_rank_group_bwd_native",
)
