# SPDX-License-Identifier: Apache-2.0
"""Random projections that all layers of an adapter share, each layer taking the corner it needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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
