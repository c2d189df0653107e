# SPDX-License-Identifier: Apache-2.0
"""OLoRA: W = Q R,  b = Q_r,  a = R_r,  and the base keeps W - s b a.

Source: OLoRA (arXiv 2406.01775).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.base import Base
from fastadapt.inits.init import FromWeight


class Olora(FromWeight):
    changes_base = True

    def pair(self, w: Tensor, base: Base, config: Any) -> tuple[Tensor, Tensor]:
        q, upper = torch.linalg.qr(w)
        return upper[: config.r], q[:, : config.r]
