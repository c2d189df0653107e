# SPDX-License-Identifier: Apache-2.0
"""``low_rank_group`` by the steps of an implementation, and by one native call a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastadapt.ops import native
from fastadapt.ops.bits import FLAT_TENSORS, Bits, Dense, Nf4, flatten, unflatten
from fastadapt.ops.low_rank_native import one_call, why_not_one_call
from fastadapt.ops.low_rank_steps import Steps, of_the_layer
from fastadapt.ops.precision import product_dtype

Decode = Callable[[list[Bits], int, torch.dtype], list[Bits]]


def as_stored(bits: list[Bits], m: int, compute: torch.dtype) -> list[Bits]:
    return bits


@cache
def decoded_together() -> Decode:
    """Weights that would be decoded one by one before each product, in one launch and one buffer;
    as they are where the fused product takes them."""
    nf4 = import_module("fastadapt.kernels.nf4")
    policy = import_module("fastadapt.kernels.policy")

    def decode(bits: list[Bits], m: int, compute: torch.dtype) -> list[Bits]:
        packed = [v for v in bits if isinstance(v, Nf4) and v.dtype in (compute, torch.float32)]
        if len(packed) < len(bits) or any(
            policy.fused(m, v.k, v.blocksize, v.dtype, compute, v.device) for v in packed
        ):
            return bits
        buffer = packed[0].packed.new_empty(sum(v.n * v.k for v in packed), dtype=compute)
        parts = buffer.split([v.n * v.k for v in packed])
        nf4.nf4_dequant_group_into(parts, [v[:8] for v in packed], compute)
        return [Dense(w.view(v.shape)) for w, v in zip(parts, packed, strict=True)]

    return decode


MAX_TOGETHER = 256
"""The largest rank of the skinny kernels: the A of a group are one matrix up to there."""


def _bits(w: list[Any], sizes: list[int], dtype: torch.dtype) -> list[Bits]:
    found = [
        unflatten((*w[FLAT_TENSORS * i : FLAT_TENSORS * (i + 1)], *sizes[4 * i : 4 * i + 4], dtype))
        for i in range(len(sizes) // 4)
    ]
    return [v for v in found if v is not None]


def _places(a: list[Tensor]) -> list[slice]:
    """Which columns of u are whose."""
    ends = [0, *accumulate(int(v.shape[0]) for v in a)]
    return [slice(i, j) for i, j in pairwise(ends)]


def _seeds(seeds: Tensor | None, p: list[float]) -> list[Tensor | None]:
    """A seed for each that drops; they were drawn for those alone."""
    counts = [0, *accumulate(int(q > 0) for q in p)]
    return [None if seeds is None or j == i else seeds[i:j] for i, j in pairwise(counts)]


def _nothing(a: list[Tensor], b: list[Tensor], needs: list[bool]) -> list[Tensor]:
    """The gradients of adapters whose output got none, and of those that need none."""
    return [
        torch.zeros_like(v) if need else v.new_empty(0)
        for v, need in zip([*a, *b], needs, strict=True)
    ]


def _together(a: list[Tensor], p: list[float]) -> bool:
    return not any(p) and sum(v.shape[0] for v in a) <= MAX_TOGETHER


def forward(
    steps: Steps, decode: Decode, x: Tensor, bias: list[Tensor | None], a: list[Tensor],
    b: list[Tensor], scale: list[float], p: list[float], seeds: Tensor | None,
    compute: torch.dtype, out: torch.dtype, w: list[Any], sizes: list[int], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """u, then y of each."""
    low, places = product_dtype(out, x.device), _places(a)
    if _together(a, p):
        u = steps.down(x, torch.cat([v.to(low) for v in a]), 0.0, None, low)
    else:
        keys = zip(a, p, _seeds(seeds, p), strict=True)
        u = torch.cat([steps.down(x, v, q, seed, low) for v, q, seed in keys], 1)
    bits = decode(_bits(w, sizes, dtype), x.shape[0], compute)
    ys = []
    asked = x.to(product_dtype(compute, x.device))
    for i, place in enumerate(places):
        y = u[:, place] @ (b[i] * scale[i]).to(low).t()
        extra = bias[i]
        own = of_the_layer(asked, bits[i], extra, compute)
        if own is not None:
            ys.append(own.add_(y).to(out))
            continue
        y = steps.product(y, asked, bits[i], compute, True)
        if extra is not None:
            y += extra.to(y.dtype)
        ys.append(y.to(out))
    return [u, *ys]


def backward(
    steps: Steps, decode: Decode, g: list[Tensor | None], x: Tensor, u: Tensor, a: list[Tensor],
    b: list[Tensor], scale: list[float], p: list[float], seeds: Tensor | None,
    compute: torch.dtype, need_x: bool, needs: list[bool], w: list[Any], sizes: list[int],
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """dx, then da and db of each; an empty tensor where none is needed or no gradient came."""
    low, places, count = product_dtype(u.dtype, x.device), _places(a), len(a)
    keys = _seeds(seeds, p)
    grads = _nothing(a, b, needs)
    came = [i for i, v in enumerate(g) if v is not None]
    du: dict[int, Tensor] = {}
    for i in (i for i in came if need_x or needs[i] or needs[count + i]):
        incoming: Any = g[i]
        du[i], db = steps.up_grad(incoming.to(low), u[:, places[i]], b[i], scale[i])
        if needs[count + i]:
            grads[count + i] = db
    wanted = [i for i in du if needs[i]]
    if wanted and _together(a, p):
        rows = [du[i] for i in wanted]
        wide = torch.promote_types(low, torch.float32)
        da = steps.down_grad(x, torch.cat(rows, 1), 0.0, None, wide)
        for i, part in zip(wanted, da.split([v.shape[1] for v in rows]), strict=True):
            grads[i] = part.to(a[i].dtype, copy=True)
    else:
        for i in wanted:
            grads[i] = steps.down_grad(x, du[i], p[i], keys[i], a[i].dtype)
    if not need_x:
        return [x.new_empty(0), *grads]
    if not du:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format), *grads]
    if _together(a, p):
        held = torch.cat([a[i].to(low) for i in du])
        dx = steps.input_grad(torch.cat(list(du.values()), 1), held, 0.0, None)
    else:
        parts = [steps.input_grad(v, a[i], p[i], keys[i]) for i, v in du.items()]
        dx = parts[0]
        for part in parts[1:]:
            dx += part
    bits = decode([v for i, v in enumerate(_bits(w, sizes, dtype)) if i in du], x.shape[0], compute)
    for i, kept in zip(du, bits, strict=True):
        incoming = g[i]
        dx = steps.product(dx, incoming, kept, compute, False)
    return [dx.to(x.dtype), *grads]


def forward_in_calls(
    x: Tensor, bias: list[Tensor | None], a: list[Tensor], b: list[Tensor], scale: list[float],
    p: list[float], seeds: Tensor | None, compute: torch.dtype, out: torch.dtype, w: list[Any],
    sizes: list[int], dtype: torch.dtype,
) -> list[Tensor] | None:  # fmt: skip
    """``forward`` by one native call a layer; None where one of them cannot be."""
    flat = [flatten(v) for v in _bits(w, sizes, dtype)]
    if any(why_not_one_call(x, q, compute, out, f) for q, f in zip(p, flat, strict=True)):
        return None
    members = zip(bias, a, b, scale, p, _seeds(seeds, p), strict=True)
    found = [one_call(x, *v, *f) for v, f in zip(members, flat, strict=True)]
    return [torch.cat([u for _, u in found], 1), *(y for y, _ in found)]


def backward_in_calls(
    g: list[Tensor | None], x: Tensor, u: Tensor, a: list[Tensor], b: list[Tensor],
    scale: list[float], p: list[float], seeds: Tensor | None, compute: torch.dtype, need_x: bool,
    needs: list[bool], w: list[Any], sizes: list[int], dtype: torch.dtype,
) -> list[Tensor] | None:  # fmt: skip
    """``backward`` by one native call a layer; None where one of them cannot be."""
    flat = [flatten(v) for v in _bits(w, sizes, dtype)]
    if any(why_not_one_call(x, q, compute, u.dtype, f) for q, f in zip(p, flat, strict=True)):
        return None
    count, places, keys = len(a), _places(a), _seeds(seeds, p)
    grads = _nothing(a, b, needs)
    dx: Tensor | None = None
    for i, incoming in enumerate(g):
        need_a, need_b = needs[i], needs[count + i]
        if incoming is None or not (need_x or need_a or need_b):
            continue
        part, da, db = native.low_rank_bwd(
            incoming, x, u[:, places[i]].contiguous(), a[i], b[i], scale[i], p[i], keys[i],
            need_x, need_a, need_b, *flat[i],
        )  # fmt: skip
        grads[i], grads[count + i] = da if need_a else grads[i], db if need_b else grads[count + i]
        dx = part if dx is None else dx.add_(part)
    if dx is None or not need_x:
        dx = torch.zeros(x.shape if need_x else (0,), dtype=x.dtype)
    return [dx, *grads]
