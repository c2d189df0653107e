# SPDX-License-Identifier: Apache-2.0
"""y = x W^T + bias; also every quantised layer that derives from nn.Linear."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.kinds.kind import Kind


class Linear(Kind):
    name = "linear"
    product = True

    @classmethod
    def claims(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.out_features, self.layer.in_features

    @property
    def stock_forward(self) -> bool:
        cls = type(self.layer)
        return cls.forward is nn.Linear.forward or cls.__module__.startswith("bitsandbytes.")

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        return F.linear(h, w)

    def pair(self, r: int, bias: bool) -> tuple[nn.Module, nn.Module]:
        n, k = self.shape
        return nn.Linear(k, r, bias=False), nn.Linear(r, n, bias=bias)
