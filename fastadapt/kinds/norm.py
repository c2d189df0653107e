# SPDX-License-Identifier: Apache-2.0
"""LayerNorm, RMSNorm and their like: any layer whose weight is a vector; W is (channels, 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastadapt.errors import UnsupportedError
from fastadapt.kinds.kind import Kind


class Norm(Kind):
    name = "norm"

    @classmethod
    def claims(cls, layer: nn.Module) -> bool:
        weight = getattr(layer, "weight", None)
        return isinstance(weight, Tensor) and weight.dim() == 1 and weight.is_floating_point()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.weight.shape[0], 1

    def orient(self, w: Tensor) -> Tensor:
        return w.unsqueeze(1) if w.dim() == 1 else w.squeeze(1)

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        own = {"weight": self.orient(w)}
        if getattr(self.layer, "bias", None) is not None:
            own["bias"] = torch.zeros_like(self.layer.bias)
        y: Tensor = functional_call(self.layer, own, (x,))
        return y

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        raise UnsupportedError("a norm has no channels to mix")

    def pair(self, r: int, bias: bool) -> tuple[nn.Module, nn.Module]:
        raise UnsupportedError("a norm has a vector, not a matrix: there is nothing of rank r")
