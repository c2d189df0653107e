# SPDX-License-Identifier: Apache-2.0
"""Orthogonal: b a = 0 although neither is, from the odd and the even rows of one rotation.

    Q: (r, r) orthogonal, a = (N(0, 1) Q_odd)^T / 10, b = N(0, 1)^T Q_even / 10;  r is even

Source: datta0.github.io/posts/rethink-lora-init.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastadapt.base import Base
from fastadapt.errors import ConfigError
from fastadapt.inits.init import Init


class Orthogonal(Init):
    def fill(self, a: Tensor, b: Tensor, base: Base, config: Any) -> None:
        r, width = a.shape[0], math.prod(a.shape[1:])
        if r % 2 or b.shape[1] != r:
            raise ConfigError(
                f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead."
                if r % 2
                else "init_lora_weights='orthogonal' on a convolution with groups: B A is no weight"
            )
        if a.is_meta:
            return
        q = torch.linalg.qr(torch.randn(r, r))[0]
        left = torch.randn(width, r // 2).mm(q[0::2]).t() / 10
        right = torch.randn(r // 2, b.shape[0]).t().mm(q[1::2]) / 10
        with torch.no_grad():
            a.copy_(left.reshape(a.shape))
            b.copy_(right.reshape(b.shape))
