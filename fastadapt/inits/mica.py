# SPDX-License-Identifier: Apache-2.0
"""MiCA: b = the r left singular vectors of W with the smallest singular values, and stays; a = 0.

Source: MiCA (arXiv 2604.01694).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.base import Base
from fastadapt.inits.init import FromWeight


class Mica(FromWeight):
    frozen = ("B",)
    indexed = True

    def pair(self, w: Tensor, base: Base, config: Any) -> tuple[Tensor, Tensor]:
        u = torch.linalg.svd(w, full_matrices=False)[0]
        return torch.zeros(config.r, w.shape[1], device=w.device), u[:, -config.r :]
