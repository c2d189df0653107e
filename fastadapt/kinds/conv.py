# SPDX-License-Identifier: Apache-2.0
"""Convolutions in one to three dimensions, grouped or not; W is (out, in / groups, *kernel)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.errors import UnsupportedError
from fastadapt.kinds.kind import Kind

_FUNCTIONS: tuple[tuple[type[nn.Module], Any], ...] = (
    (nn.Conv1d, F.conv1d),
    (nn.Conv2d, F.conv2d),
    (nn.Conv3d, F.conv3d),
)


class Conv(Kind):
    name = "conv"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self._cls, self._conv = next(f for f in _FUNCTIONS if isinstance(layer, f[0]))

    @classmethod
    def claims(cls, layer: nn.Module) -> bool:
        return isinstance(layer, tuple(f[0] for f in _FUNCTIONS))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.layer.weight.shape)

    @property
    def groups(self) -> int:
        return int(self.layer.groups)

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        layer = self.layer
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = layer.padding if layer.padding_mode == "zeros" else 0
        y: Tensor = self._conv(x, w, None, layer.stride, padding, layer.dilation, layer.groups)
        return y

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        """With groups, w holds the rows of all groups: (out, r / groups), as ``pair`` makes it."""
        kernel = (1,) * (h.dim() - 2)
        y: Tensor = self._conv(h, w.view(*w.shape[:2], *kernel), groups=self.layer.groups)
        return y

    def channels(self, v: Tensor) -> Tensor:
        return v.view(-1, *(1,) * (self.layer.weight.dim() - 2))

    def pair(self, r: int, bias: bool) -> tuple[nn.Module, nn.Module]:
        layer, cls = self.layer, self._cls
        if r % layer.groups:
            raise UnsupportedError(
                f"Targeting a {cls.__name__} with groups={layer.groups} and rank {r}. Currently, "
                "support is limited to conv layers where the rank is divisible by groups."
            )
        make: Any = cls
        a = make(
            layer.in_channels, r, layer.kernel_size, layer.stride, layer.padding,
            dilation=layer.dilation, groups=layer.groups, bias=False,
        )  # fmt: skip
        return a, make(r, layer.out_channels, 1, 1, groups=layer.groups, bias=bias)
