# SPDX-License-Identifier: Apache-2.0
"""W' = W + s b a  where a and b are made of smaller things.

    a: (r, in * kernel)  b: (out, r)

Unlike LoRA's, the rank of a grouped convolution is not divided among its groups.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base


class PairAdapter(Adapter):
    """dropout: the part that holds the dropout on the input, "" for none."""

    dropout: ClassVar[str] = ""
    scale: float = 1.0

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(a, b) for a weight of this shape."""
        raise NotImplementedError

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.pair(tuple(w.shape))
        delta = (b @ a).view(w.shape) * self.scale
        return w.to(delta.dtype) + delta.to(w.device), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        a, b = self.pair(base.shape)
        p = self.rate(self.dropout) if self.dropout else 0.0
        if base.groups == 1:
            return base.low_rank(x, a.view(-1, *base.shape[1:]), b, self.scale, p)
        y = base(x)
        delta = (b @ a).view(base.shape) * self.scale
        return y + base.apply(base.drop(x, p).to(delta.dtype), delta).to(y.dtype)


def drop_part(p: float) -> nn.Module:
    """The module that PEFT has under ``xxx_dropout``."""
    return nn.Dropout(p) if p > 0 else nn.Identity()
