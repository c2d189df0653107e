# SPDX-License-Identifier: Apache-2.0
"""Several low-rank adapters in one batch: the base product once, over all rows, and each adapter
over its own rows.

    x: (m, k) in equal blocks of rows, block j through adapter i = index[j] (or none, where i < 0)
    y_j = x_j W^T + bias + s_i (drop(x_j) A_i^T) B_i^T        a_i: (r_i, k)  b_i: (n, r_i)
    dx = g W + drop'(du A)   du_j = s_i g_j B_i   da_i = du^T drop(x)   db_i = s_i g^T u

The sums of da_i and db_i are over the rows of adapter i; ranks may differ. Saved for backward: x
and u (m, max r). ``index`` is known on the host, so that no GPU waits and a CUDA graph can capture.
Source: LoRA (arXiv 2106.09685); batches of many adapters: Punica (arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.errors import KernelError
from fastadapt.ops import native
from fastadapt.ops.bits import FLAT_TENSORS, Bits, flatten, unflatten
from fastadapt.ops.dispatch import Op
from fastadapt.ops.dropout import check_p
from fastadapt.ops.low_rank import BITS, check_low_rank, unviewed, why_not_triton
from fastadapt.ops.low_rank_steps import NATIVE, REFERENCE, Steps, triton_steps
from fastadapt.ops.precision import product_dtype


class Pair(NamedTuple):
    """One adapter: a (r, k), b (n, r), the scale s, and the dropout p on its input."""

    a: Tensor
    b: Tensor
    scale: float
    p: float


def low_rank_mixed(
    x: Tensor,
    pairs: Sequence[Pair],
    index: Sequence[int],
    *,
    n: int,
    bits: Bits | None = None,
    bias: Tensor | None = None,
    compute: torch.dtype,
    out: torch.dtype,
) -> Tensor:
    """x: (.., k) -> (.., n), or the low-rank part alone when ``bits`` is None.

    index: the adapter of each of the equal blocks that the rows of x are cut into, -1 for none
    Raises KernelError for shapes that do not fit, an index of no adapter, and a p that ``check_p``
    refuses."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if not index or rows % len(index):
        raise KernelError(
            f"low_rank_mixed: expected {rows} rows in equal blocks, got an index of {len(index)}"
        )
    if max(index) >= len(pairs):
        raise KernelError(
            f"low_rank_mixed: expected an index below {len(pairs)}, the number of adapters, got "
            f"{max(index)}"
        )
    for pair in pairs:
        check_low_rank(x, pair.a, pair.b, bits, bias)
        check_p(pair.p)
        if pair.b.shape[0] != n:
            raise KernelError(f"low_rank_mixed: expected b (n={n}, r), got {tuple(pair.b.shape)}")
    seeds = None
    if any(pair.p > 0 for pair in pairs):
        size = (len(pairs),)
        seeds = torch.randint(-(2**63), 2**63 - 1, size, dtype=torch.int64, device=x.device)
    y: Tensor = LowRankMixedFunction.apply(  # type: ignore[no-untyped-call]
        x, bias, n, [v.scale for v in pairs], [v.p for v in pairs], seeds, list(index), compute,
        out, *flatten(bits), *(v.a for v in pairs), *(v.b for v in pairs),
    )  # fmt: skip
    return y


class LowRankMixedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, n: int, scale: list[float], p: list[float],
        seeds: Tensor | None, index: list[int], compute: torch.dtype, out: torch.dtype,
        *rest: Any,
    ) -> Tensor:  # fmt: skip
        bits, a, b = _split(rest, len(scale))
        rows = x.reshape(-1, x.shape[-1])
        y, u = low_rank_mixed_fwd(
            rows, bias, a, b, n, scale, p, seeds, index, compute, out, *bits
        )  # fmt: skip
        ctx.save_for_backward(x, u, seeds, *bits[:FLAT_TENSORS], *a, *b)
        ctx.plain = (scale, p, index, compute, bits[FLAT_TENSORS:])
        ctx.bias_dtype = None if bias is None else bias.dtype
        return unviewed(y, (*x.shape[:-1], n))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, u, seeds, *rest = ctx.saved_tensors
        scale, p, index, compute, plain = ctx.plain
        tensors, pairs = rest[:FLAT_TENSORS], rest[FLAT_TENSORS:]
        count = len(scale)
        need_x, need_bias = ctx.needs_input_grad[:2]
        needs = list(ctx.needs_input_grad[-2 * count :]) if count else []
        rows, gs = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        dx, *grads = low_rank_mixed_bwd(
            gs, rows, u, pairs[:count], pairs[count:], scale, p, seeds, index, compute, need_x,
            needs, *tensors, *plain,
        )  # fmt: skip
        wide = torch.promote_types(g.dtype, torch.float32)
        dbias = gs.sum(0, dtype=wide).to(ctx.bias_dtype) if need_bias else None
        found = (v if need else None for v, need in zip(grads, needs, strict=True))
        return (
            dx.view(x.shape) if need_x else None,
            dbias,
            *(None,) * (7 + len(tensors) + len(plain)),
            *found,
        )


def _split(rest: tuple[Any, ...], count: int) -> tuple[tuple[Any, ...], list[Any], list[Any]]:
    """The flat bits, a of each adapter, b of each."""
    end = len(rest) - 2 * count
    return rest[:end], list(rest[end : end + count]), list(rest[end + count :])


def low_rank_mixed_fwd_reference(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward(REFERENCE, *args)


def low_rank_mixed_bwd_reference(*args: Any) -> list[Tensor]:
    return _backward(REFERENCE, *args)


def low_rank_mixed_fwd_native(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward(NATIVE, *args)


def low_rank_mixed_bwd_native(*args: Any) -> list[Tensor]:
    return _backward(NATIVE, *args)


def low_rank_mixed_fwd_triton(
    x: Tensor, bias: Tensor | None, a: list[Tensor], b: list[Tensor], n: int, scale: list[float],
    p: list[float], seeds: Tensor | None, index: list[int], compute: torch.dtype,
    out: torch.dtype, *flat: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One launch a step for all adapters, but adapter by adapter where ``_plan`` has none."""
    plan, low = _plan(x, a, scale, p, index, out), product_dtype(out, x.device)
    if plan is None:
        return _forward(triton_steps(), x, bias, a, b, n, scale, p, seeds, index, compute, out,
                        *flat)  # fmt: skip
    y, u = _kernels().forward(x, a, b, seeds, plan, low)
    return _finished(triton_steps(), y, x, bias, compute, out, flat), u


def low_rank_mixed_bwd_triton(
    g: Tensor, x: Tensor, u: Tensor, a: list[Tensor], b: list[Tensor], scale: list[float],
    p: list[float], seeds: Tensor | None, index: list[int], compute: torch.dtype, need_x: bool,
    needs: list[bool], *flat: Any,
) -> list[Tensor]:  # fmt: skip
    plan, bits = _plan(x, a, scale, p, index, u.dtype), unflatten(flat)
    if plan is None:
        return _backward(triton_steps(), g, x, u, a, b, scale, p, seeds, index, compute, need_x,
                         needs, *flat)  # fmt: skip
    dx, da, db = x.new_empty(0), [], []
    if need_x or any(needs):
        need_a = any(needs[: len(a)])
        dx, da, db = _kernels().backward(g, x, u, a, b, seeds, plan, need_x, need_a)
    if need_x:
        if bits is not None:
            dx = triton_steps().product(dx, g, bits, compute, False)
        dx = dx.to(x.dtype)
    else:
        dx = x.new_empty(0)
    found = [*(da or a), *(db or b)]
    return [dx, *(v if need else v.new_empty(0) for v, need in zip(found, needs, strict=True))]


def why_not_low_rank_mixed_fwd_native(x: Tensor, *_: object) -> str | None:
    return native.why_not() if x.device.type == "cpu" else "x is not on a CPU"


why_not_low_rank_mixed_bwd_native = why_not_low_rank_mixed_fwd_native


def why_not_low_rank_mixed_fwd_triton(x: Tensor, bias: object, *rest: Any) -> str | None:
    a, p, out = rest[0], rest[4], rest[8]
    return next(
        filter(None, (why_not_triton(x, v, out, q > 0) for v, q in zip(a, p, strict=True))), None
    )


def why_not_low_rank_mixed_bwd_triton(
    g: Tensor, x: Tensor, u: Tensor, a: list[Tensor], *rest: Any
) -> str | None:
    p = rest[2]
    return next(
        filter(None, (why_not_triton(x, v, u.dtype, q > 0) for v, q in zip(a, p, strict=True))),
        None,
    )


@cache
def _kernels() -> Any:
    return import_module("fastadapt.kernels.low_rank_mixed")


def _plan(
    x: Tensor, a: list[Tensor], scale: list[float], p: list[float], index: list[int],
    dtype: torch.dtype,
) -> Any:  # fmt: skip
    """Which rows belong to whom, on the device; None without adapters, and in the capture of a CUDA
    graph that no batch of this layout ran before."""
    ranks = [v.shape[0] for v in a]
    if not ranks:
        return None
    heights = _kernels().row_tiles(max(ranks), dtype.itemsize)
    plans = import_module("fastadapt.kernels.mixed_plan")
    return plans.plan_of(index, x.shape[0] // len(index), ranks, scale, p, x.device, heights)


class _Rows:
    """The rows of one adapter, out of all and back, by slices that the host knows."""

    def __init__(self, index: list[int], adapter: int, height: int) -> None:
        # neighbouring blocks are one slice
        self.slices: list[tuple[int, int]] = []
        for j in (j for j, i in enumerate(index) if i == adapter):
            if self.slices and self.slices[-1][1] == j:
                self.slices[-1] = (self.slices[-1][0], j + 1)
            else:
                self.slices.append((j, j + 1))
        self.height = height

    def take(self, t: Tensor) -> Tensor:
        parts = [t[i * self.height : j * self.height] for i, j in self.slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, t: Tensor, value: Tensor) -> None:
        done = 0
        for i, j in self.slices:
            count = (j - i) * self.height
            t[i * self.height : j * self.height, : value.shape[1]] = value[done : done + count]
            done += count


def _forward(
    steps: Steps, x: Tensor, bias: Tensor | None, a: list[Tensor], b: list[Tensor], n: int,
    scale: list[float], p: list[float], seeds: Tensor | None, index: list[int],
    compute: torch.dtype, out: torch.dtype, *flat: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    low = product_dtype(out, x.device)
    u = x.new_zeros((x.shape[0], max((v.shape[0] for v in a), default=0)), dtype=low)
    y = x.new_zeros((x.shape[0], n), dtype=low)
    for i in sorted(set(index) - {-1}):
        rows = _Rows(index, i, x.shape[0] // len(index))
        hidden = steps.down(rows.take(x), a[i], p[i], _seed(seeds, p, i), low)
        rows.put(u, hidden)
        rows.put(y, hidden @ (b[i] * scale[i]).to(low).t())
    return _finished(steps, y, x, bias, compute, out, flat), u


def _finished(
    steps: Steps, y: Tensor, x: Tensor, bias: Tensor | None, compute: torch.dtype,
    out: torch.dtype, flat: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """The base product and the bias, added to the low-rank parts y."""
    bits = unflatten(flat)
    if bits is not None:
        y = steps.product(y, x, bits, compute, True)
    if bias is not None:
        y += bias.to(y.dtype)
    return y.to(out)


def _backward(
    steps: Steps, g: Tensor, x: Tensor, u: Tensor, a: list[Tensor], b: list[Tensor],
    scale: list[float], p: list[float], seeds: Tensor | None, index: list[int],
    compute: torch.dtype, need_x: bool, needs: list[bool], *flat: Any,
) -> list[Tensor]:  # fmt: skip
    """dx, then da and db of each adapter; an empty tensor where none is needed."""
    low, bits = product_dtype(u.dtype, x.device), unflatten(flat)
    count = len(a)
    grads = [
        torch.zeros_like(v) if need else v.new_empty(0)
        for v, need in zip([*a, *b], needs, strict=True)
    ]
    dx = x.new_zeros(x.shape if need_x else 0, dtype=low if need_x else x.dtype)
    for i in sorted(set(index) - {-1}):
        need_a, need_b = needs[i], needs[count + i]
        if not (need_x or need_a or need_b):
            continue
        rows, seed = _Rows(index, i, x.shape[0] // len(index)), _seed(seeds, p, i)
        hidden = rows.take(u)[:, : a[i].shape[0]]
        du, grad = steps.up_grad(rows.take(g).to(low), hidden, b[i], scale[i])
        if need_b:
            grads[count + i] = grad
        if need_a:
            grads[i] = steps.down_grad(rows.take(x), du, p[i], seed, a[i].dtype)
        if need_x:
            rows.put(dx, steps.input_grad(du, a[i], p[i], seed))
    if need_x:
        if bits is not None:
            dx = steps.product(dx, g, bits, compute, False)
        dx = dx.to(x.dtype)
    return [dx, *grads]


def _seed(seeds: Tensor | None, p: list[float], i: int) -> Tensor | None:
    return seeds[i : i + 1] if seeds is not None and p[i] > 0 else None


_PAIRS = "Tensor[] a, Tensor[] b, "
_PLAIN = "float[] scale, float[] p, Tensor? seeds, int[] index, ScalarType compute, "

low_rank_mixed_fwd = Op(
    "low_rank_mixed_fwd",
    f"(Tensor x, Tensor? bias, {_PAIRS}SymInt n_out, {_PLAIN}ScalarType out, {BITS}) "
    "-> (Tensor, Tensor)",
    low_rank_mixed_fwd_reference,
    triton="fastadapt.ops.low_rank_mixed:low_rank_mixed_fwd_triton",
    native="fastadapt.ops.low_rank_mixed:low_rank_mixed_fwd_native",
)
low_rank_mixed_bwd = Op(
    "low_rank_mixed_bwd",
    f"(Tensor g, Tensor x, Tensor u, {_PAIRS}{_PLAIN}bool need_x, bool[] needs, {BITS}) "
    "-> Tensor[]",
    low_rank_mixed_bwd_reference,
    triton="fastadapt.ops.low_rank_mixed:low_rank_mixed_bwd_triton",
    native="fastadapt.ops.low_rank_mixed:low_rank_mixed_bwd_native",
)
