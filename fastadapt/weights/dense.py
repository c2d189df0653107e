# SPDX-License-Identifier: Apache-2.0
"""A plain floating-point weight."""

from __future__ import annotations

from torch import Tensor, nn

from fastadapt.ops.bits import Bits, Dense
from fastadapt.weights.weight import Weight


class DenseWeight(Weight):
    name = "dense"

    @classmethod
    def claims(cls, layer: nn.Module) -> bool:
        weight = getattr(layer, "weight", None)
        return isinstance(weight, Tensor) and weight.is_floating_point()

    def read(self) -> Tensor:
        return self.layer.weight.detach()  # type: ignore[no-any-return]

    def write(self, w: Tensor) -> None:
        old = self.layer.weight
        # a new Parameter, so that a tied layer keeps its own weight
        data = w.to(old.dtype).contiguous().clone()
        self.layer.weight = nn.Parameter(data, requires_grad=old.requires_grad)

    def bits(self) -> Bits | None:
        return Dense(self.layer.weight)
