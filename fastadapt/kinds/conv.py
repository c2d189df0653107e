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
        """As many groups as the channels of x say: a full weight (r, in, *kernel) has one."""
        layer = self.layer
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = layer.padding if layer.padding_mode == "zeros" else 0
        groups = x.shape[1 - w.dim()] // w.shape[1]
        y: Tensor = self._conv(x, w, None, layer.stride, padding, layer.dilation, groups)
        return y

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        """w: (out, r), or (out, r / groups) for a grouped map."""
        kernel = (1,) * (self.layer.weight.dim() - 2)
        groups = h.shape[-1 - len(kernel)] // w.shape[1]
        y: Tensor = self._conv(h, w.reshape(*w.shape[:2], *kernel), groups=groups)
        return y

    def channels(self, v: Tensor) -> Tensor:
        return v.view(-1, *(1,) * (self.layer.weight.dim() - 2))

    def inputs(self, v: Tensor) -> Tensor:
        return self.channels(v)

    def pair(self, r: int, bias: bool) -> tuple[nn.Module, nn.Module]:
        """A full convolution to r channels, and a 1x1 that is grouped as the layer is."""
        layer, cls = self.layer, self._cls
        if r % layer.groups:
            raise UnsupportedError(
                f"Targeting a {cls.__name__} with groups={layer.groups} and rank {r}. Currently, "
                "support is limited to conv layers where the rank is divisible by groups. Either "
                "choose a different rank or do not target this specific layer."
            )
        make: Any = cls
        a = make(layer.in_channels, r, layer.kernel_size, layer.stride, layer.padding, bias=False)
        return a, make(r, layer.out_channels, 1, 1, groups=layer.groups, bias=bias)
