# SPDX-License-Identifier: Apache-2.0
"""Few coefficients between two cheap transforms:  y = T_out M T_in x, M sparse, nothing dense.

    x: (..., in) -> h: (k, tokens)   M: (out', k) with n entries   -> y: (..., out)

Tokens run last, so that an entry of M takes and adds whole contiguous rows. ``positions`` draws
where the entries are, as PEFT does; ``gather_add`` is M.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def positions(out: int, inner: int, n: int, seed: int) -> Tensor:
    """(2, n) rows and columns, none twice; int64 on the CPU. Kept: layers of one shape have the
    same ones, and a permutation of out * in numbers takes 0.1 s at 3072 x 3072."""
    with torch.device("cpu"):
        source = torch.Generator("cpu").manual_seed(seed)
        flat = torch.randperm(out * inner, generator=source)[:n]
        return torch.stack([flat // inner, flat % inner])


def gather_add(h: Tensor, source: Tensor, target: Tensor, factor: Tensor, rows: int) -> Tensor:
    """h: (k, tokens)  source, target, factor: (n,) -> (rows, tokens): row target[j] receives
    factor[j] h[source[j]]."""
    made = h.new_zeros(rows, h.shape[1])
    return made.index_add_(0, target, h.index_select(0, source) * factor[:, None])


def inner_products(g: Tensor, h: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """(n,): the inner product of g[target[j]] and h[source[j]]; the gradient of ``factor``."""
    return (g.index_select(0, target) * h.index_select(0, source)).sum(1)
