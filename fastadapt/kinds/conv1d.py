# SPDX-License-Identifier: Apache-2.0
"""GPT-2's Conv1D, a linear layer that stores W as (in, out)."""

from __future__ import annotations

from torch import Tensor, nn

from fastadapt.kinds.linear import Linear

_HOME = "transformers.pytorch_utils"


class Conv1dGpt2(Linear):
    name = "conv1d_gpt2"

    @classmethod
    def claims(cls, layer: nn.Module) -> bool:
        return any(c.__name__ == "Conv1D" and c.__module__ == _HOME for c in type(layer).__mro__)

    @property
    def shape(self) -> tuple[int, ...]:
        k, n = self.layer.weight.shape
        return n, k

    @property
    def stock_forward(self) -> bool:
        return type(self.layer).__module__ == _HOME

    def orient(self, w: Tensor) -> Tensor:
        return w.t()
