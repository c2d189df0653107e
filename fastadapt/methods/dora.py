# SPDX-License-Identifier: Apache-2.0
"""DoRA:  W' = (m / ||W + s B A||) (W + s B A), the norm over each output row, taken as a constant.

    m: (out,), starts at ||W + s B A||, so that the start is the identity

With dropout PEFT drops the input of the base product too, but only inside the correction:
y = W x + bias + (g - 1) W d(x) + g s B A d(x), g = m / norm. That is
base(x - d(x)) + g (W + s B A) d(x): two base products.
Source: DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.errors import UnsupportedError
from fastadapt.methods.lora import Lora
from fastadapt.ops.scale import scale as scale_channels


class Magnitude(nn.Module):
    """Holds m as ``weight``, where PEFT has it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))


class Dora(Lora):
    name = "dora"

    def build(self, base: Base, shared: Any) -> None:
        if base.groups > 1:
            raise UnsupportedError(
                "use_dora=True on a convolution with groups: the update of its low-rank pair is "
                "no weight of the layer's shape, so that W + s B A has no rows to take the norm of"
            )
        super().build(base, shared)
        out, _, *kernel = base.shape
        # PEFT's m of a convolution is (1, out, 1, ..)
        shape = (1, out, *[1] * len(kernel)) if kernel else (out,)
        self.parts["lora_magnitude_vector"] = Magnitude(*shape)

    def start(self, base: Base) -> None:
        super().start(base)
        m = self["lora_magnitude_vector"].weight
        with torch.no_grad():
            m.copy_(base.row_norm(*self.pair(), self["scaling"]).view_as(m))

    def file_key(self, part: str, leaf: str) -> str | None:
        # PEFT's files hold m as a plain tensor, though its model holds a module
        return part if part == "lora_magnitude_vector" else super().file_key(part, leaf)

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w, bias = super().merged(w, bias)
        factor = self._factor(w.detach().flatten(1).norm(dim=1))
        return w * factor.view(-1, *[1] * (w.dim() - 1)), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        a, b, scale = *self.pair(), self["scaling"]
        factor = self._factor(base.row_norm(a, b, scale))
        kept = base.drop(x, self.rate("lora_dropout"))
        y = base.low_rank(kept, a, b, scale)
        # the bias is in y, and is not scaled; with dropout it comes with the rest as well
        bias, rest = base.bias, None if kept is x else base(x - kept)
        shift = bias if bias is None else bias * ((1 if rest is None else 0) - factor)
        axis = y.dim() + 1 - len(base.shape)
        return scale_channels(
            y, factor, axis=axis, shift=shift, rest=None if rest is None else rest.to(y.dtype)
        )

    def _factor(self, norm: Tensor) -> Tensor:
        """m / norm; 1 for a row that is all zero, whose direction is not defined (PEFT: NaN)."""
        m: Tensor = self["lora_magnitude_vector"].weight.flatten()
        safe = torch.where(norm > 0, norm, torch.ones_like(norm)).to(m.dtype)
        return torch.where(norm > 0, m / safe, torch.ones_like(m))
