# SPDX-License-Identifier: Apache-2.0
"""PiSSA: the adapter starts as the r largest singular values of W, the base keeps the rest.

    W = U S V^T     b = U_r (S_r / s)^1/2     a = (S_r / s)^1/2 V_r^T     W_res = W - s b a

"pissa_niter_N": the SVD by N power iterations on a random projection, in seconds instead of
minutes. Source: PiSSA (arXiv 2404.02948).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.base import Base
from fastadapt.inits.init import FromWeight


class Pissa(FromWeight):
    changes_base = True

    def pair(self, w: Tensor, base: Base, config: Any) -> tuple[Tensor, Tensor]:
        r = config.r
        if self.iterations is None:
            u, s, vt = torch.linalg.svd(w, full_matrices=False)
            u, s, vt = u[:, :r], s[:r], vt[:r]
        else:
            u, s, v = torch.svd_lowrank(w, r, niter=self.iterations)
            vt = v.t()
        root = (s / config.scaling).sqrt()
        return root.unsqueeze(1) * vt, u * root
