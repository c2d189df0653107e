# SPDX-License-Identifier: Apache-2.0
"""A linear layer that was quantised and is 16 bit wide now: its weight must not be rounded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear16(nn.Linear):
    """``nn.Linear`` that takes the place of a quantised layer: like that, it multiplies in its own
    dtype and answers in the input's."""

    def __init__(self, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = w.shape
        self.weight = nn.Parameter(w.detach().to(dtype).contiguous(), requires_grad=False)
        made = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        self.register_parameter("bias", made)

    def forward(self, x: Tensor) -> Tensor:
        w, bias = self.weight, self.bias
        y = F.linear(x.to(w.dtype), w, None if bias is None else bias.to(w.dtype))
        return y.to(x.dtype)
