# SPDX-License-Identifier: Apache-2.0
"""Where the trained numbers of a sparse matrix are, as PEFT draws them."""

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
