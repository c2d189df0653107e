# SPDX-License-Identifier: Apache-2.0
"""Random projections that all layers of an adapter share, each layer taking the corner it needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastadapt.base import Base


def size(shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, in, *kernel) -> (out, in * kernel)."""
    return shape[0], math.prod(shape[1:])


def largest(bases: Iterable[Base]) -> tuple[int, int]:
    """The largest of each size among the layers."""
    sizes = [size(b.shape) for b in bases]
    return max(s[0] for s in sizes), max(s[1] for s in sizes)


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def uniform(rows: int, columns: int, source: torch.Generator) -> nn.Parameter:
    """(rows, columns), U(-sqrt(6 / columns), sqrt(6 / columns)): Kaiming's; never trained."""
    made = torch.empty(rows, columns)
    bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(columns)
    if not made.is_meta:
        made.uniform_(-bound, bound, generator=source)
    return nn.Parameter(made, requires_grad=False)


def near(shared: Tensor, own: Tensor) -> Tensor:
    """A shared tensor where the layer's own parameters are (a model over several devices)."""
    return shared if shared.device == own.device else shared.to(own.device)


def projected(x: Tensor, a: Tensor, rows: int, kind: torch.dtype) -> Tensor:
    """x A^T for the first rows and columns of a constant A, in ``kind``: (.., rows). Layers that
    get the same x, as q, k and v do, have one product, and one gradient of x from it."""
    # a leaf that learns is held by what is made of it, which must not hold it back
    lasting = (
        torch.is_grad_enabled() and not x.is_inference() and not (x.is_leaf and x.requires_grad)
    )
    if torch.compiler.is_compiling() or not lasting:
        h: Tensor = ProjectFunction.apply(x, a, rows, kind)  # type: ignore[no-untyped-call]
        return h
    key = (rows, kind, x._version, a._version, x.requires_grad)
    of, known, h = getattr(x, "_projected", (None, None, x))
    if of is not a or known != key:
        h = ProjectFunction.apply(x, a, rows, kind)  # type: ignore[no-untyped-call]
        x._projected = a, key, h  # type: ignore[attr-defined]
    return h


class ProjectFunction(torch.autograd.Function):
    """A stands on ctx and nothing is saved, so that the layers that share a product may go backward
    one at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, rows: int, kind: torch.dtype) -> Tensor:
        ctx.a, ctx.rows, ctx.width, ctx.dtype = a, rows, x.shape[-1], x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return x.to(kind) @ a[:rows, : x.shape[-1]].to(kind).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        with torch.autocast(g.device.type, enabled=False):
            return (g @ ctx.a[: ctx.rows, : ctx.width].to(g.dtype)).to(ctx.dtype), None, None, None


class ScaledFunction(torch.autograd.Function):
    """y = b (z B^T),  z = d_1 h_1 + exp(d_2 h_2 / 2) noise

    h: (.., r) or, with noise, (.., 2 r)  d: as long as h  b: (n,)  B: (n, r), a constant
    noise: (.., r) or None  ->  (.., n), in h's dtype. Saved: h and the noise.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, d: Tensor, b: Tensor, big: Tensor, noise: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(h, d, b, big, noise)
        with torch.autocast(h.device.type, enabled=False):
            y: Tensor = _drawn(h, d, noise)[0] @ big.to(h.dtype).t()
            return y.mul_(b.to(h.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, d, b, big, noise = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            z, spread = _drawn(h, d, noise)
            g, low = g.to(h.dtype), big.to(h.dtype)
            rows = g.reshape(-1, g.shape[-1])
            db = (rows.t() @ z.reshape(-1, z.shape[-1]) * low).sum(1, dtype=wide)
            dz = (g * b.to(h.dtype)) @ low
            if spread is not None:
                dz = torch.cat([dz, dz.mul(spread).mul_(0.5)], -1)
            dd = (dz * h).sum(list(range(h.dim() - 1)), dtype=wide)
            return dz.mul_(d.to(h.dtype)), dd.to(d.dtype), db.to(b.dtype), None, None


def _drawn(h: Tensor, d: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """z, and its random part."""
    z = h * d.to(h.dtype)
    if noise is None:
        return z, None
    mean, variance = z.chunk(2, -1)
    spread = variance.mul_(0.5).exp_().mul_(noise)
    return mean + spread, spread


def leading(
    w: Tensor, r: int, seed: int | None = None, niter: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets of (out, in, *kernel), in float32: u (out, r), s (r,),
    v (r, in * kernel). seed: by ``svd_lowrank`` from this seed, as PEFT draws it, in ``niter``
    power iterations; None: of the whole SVD."""
    flat = w.detach().flatten(1).float()
    if seed is None:
        u, s, v = torch.linalg.svd(flat, full_matrices=False)
        return u[:, :r], s[:r], v[:r]
    with seeded(seed, w.device):
        u, s, v = torch.svd_lowrank(flat, q=r, niter=niter)
    return u, s, v.t()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators stand at ``seed`` inside, and where they stood afterwards."""
    on_cpu = device.type == "cpu"
    where = {} if on_cpu else {"device_type": device.type}
    with torch.random.fork_rng(devices=[] if on_cpu else [device], **where):
        torch.manual_seed(seed)
        yield
