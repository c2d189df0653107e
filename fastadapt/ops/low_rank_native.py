# SPDX-License-Identifier: Apache-2.0
"""``low_rank`` in one native call each way, and when it may be.

An op of ``fastadapt.ops.dispatch`` is crossed by way of Python twice; a plain CPU layer goes
straight to the extension, with what the op would have been given. 4096 x 4096, r = 16, NF4, bf16,
2 cores with AVX-512 BF16, forward and backward against the frozen dense layer's two products: 0.65
of their time at 1 token, 0.88 at 32, 0.97 at 512; in fp32 0.86, 0.51 and 0.90.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.ops import native
from fastadapt.ops.bits import FLAT_TENSORS, whole_blocks
from fastadapt.ops.dispatch import forced


def why_not_one_call(
    x: Tensor, p: float, compute: torch.dtype, out: torch.dtype, flat: tuple[Any, ...]
) -> str | None:
    """Why the whole layer is not one native call; ``flat`` are the bits (``bits.flatten``)."""
    dtype = x.dtype
    if dtype is not out or dtype is not compute:
        return f"x is {dtype}, the product {compute}, the result {out}"
    needed = _NEEDED.get(dtype)
    if needed is None or native.isa() < needed:
        return f"{dtype} has no such kernel on this CPU"
    if p > 0 and x.shape[-1] % 8:
        return "dropout over a number of columns that is not a multiple of 8"
    w, absmax, _, nested, _, _, blocksize, nested_blocksize, _, k, rounded = flat
    if w is None:
        return None
    if absmax is None:
        if w.dtype is not dtype:
            return f"W is {w.dtype}"
        stride = w.stride()
        return None if 1 in (stride[0], stride[1]) else "W is contiguous in no dimension"
    if rounded is not compute and rounded is not torch.float32:
        return f"W is rounded to {rounded}"
    if not whole_blocks(blocksize, nested_blocksize if nested is not None else 0, k):
        return f"blocks of {blocksize} that are no power of two, or do not divide k={k}"
    return None


def direct(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, p: float, compute: torch.dtype,
    out: torch.dtype, flat: Any,
) -> bool:  # fmt: skip
    """Whether this call may leave the op out: plain tensors of shapes that fit on a CPU, nothing
    traced, no implementation forced but this one."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
        return False
    k, shape_a, shape_b = x.shape[-1], a.shape, b.shape
    return (
        len(shape_a) == len(shape_b) == 2
        and shape_a[1] == k
        and shape_a[0] == shape_b[1]
        and (flat[0] is None or (flat[8] == shape_b[0] and flat[9] == k))
        and (bias is None or bias.shape == shape_b[:1])
        and forced() in (None, "native")
        and native.why_not() is None
        and why_not_one_call(x, p, compute, out, flat) is None
    )


def one_call(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, *flat: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``native.low_rank_fwd``, where ``why_not_one_call`` knows nothing against it."""
    w, absmax, *rest = flat
    if w is None or absmax is not None or x.dtype is not torch.float32:
        return native.low_rank_fwd(x, bias, a, b, scale, p, seed, *flat)
    # the layer's own product, as in ``low_rank_steps.of_the_layer``
    y, u = native.low_rank_fwd(x, None, a, b, scale, p, seed, None, None, *rest)
    return y.add_(F.linear(x, w, bias)), u


class NativeLowRankFunction(torch.autograd.Function):
    """What ``LowRankFunction`` is to the op. ``flat`` stays one argument: autograd looks at every
    tensor that is one of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float,
        seed: Tensor | None, flat: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        y, u = one_call(x, bias, a, b, scale, p, seed, *flat)
        ctx.save_for_backward(x, u, seed, a, b, *flat[:FLAT_TENSORS])
        ctx.plain = (scale, p, flat[FLAT_TENSORS:])
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        # the wrapper costs as much as a small layer, and only a graph of the gradient needs it
        backward = _backward_once if torch.is_grad_enabled() else _backward
        return backward(ctx, g)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, u, seed, a, b, *tensors = ctx.saved_tensors
    scale, p, plain = ctx.plain
    need_x, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    dx, da, db = native.low_rank_bwd(
        g, x, u, a, b, scale, p, seed, need_x, need_a, need_b, *tensors, *plain
    )
    dbias = None
    if need_bias:
        dbias = g.reshape(-1, g.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (
        dx if need_x else None, dbias, da if need_a else None, db if need_b else None,
        None, None, None, None,
    )  # fmt: skip


_backward_once = once_differentiable(_backward)
_NEEDED = {torch.float32: native.AVX512, torch.bfloat16: native.AVX512_BF16}
