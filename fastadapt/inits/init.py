# SPDX-License-Identifier: Apache-2.0
"""What a start of a low-rank pair answers, and the starts that do not look at W.

a: (r, in, *kernel)  b: (out, r, ...)
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.base import Base, compose
from fastadapt.errors import UnsupportedError

_SHOWN = {"mica": "MiCA", "pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA"}


class Init:
    """The values that the pair has already (``init_lora_weights=False``).

    changes_base: the base keeps ``residual(W)``, so that the adapted layer starts as W
    frozen:       which of "A" and "B" never trains
    indexed:      an embedding starts this way too; otherwise it starts as by default (PEFT's rule)
    """

    changes_base: bool = False
    frozen: ClassVar[tuple[str, ...]] = ()
    indexed: ClassVar[bool] = False
    iterations: int | None = None

    def fill(self, a: Tensor, b: Tensor, base: Base, config: Any) -> None:
        """Set a and b, in place; tensors on the meta device are left."""

    def residual(self, w: Tensor, a: Tensor, b: Tensor, config: Any) -> Tensor:
        """What the base keeps of W (float32), once a and b have the dtype that they train in."""
        scale: float = config.scaling
        return w - scale * compose(a.to(w.device, w.dtype), b.to(w.device, w.dtype))

    def started(self, base: Base) -> None:
        """The base holds the residual now."""


class Standard(Init):
    """a ~ U(-1, 1) / sqrt(in), b = 0; on an embedding a = 0, b ~ N(0, 1)."""

    indexed = True

    def fill(self, a: Tensor, b: Tensor, base: Base, config: Any) -> None:
        if base.indexed:
            nn.init.zeros_(a)
            nn.init.normal_(b)
            return
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)


class Gaussian(Init):
    """a ~ N(0, 1 / r^2), b = 0."""

    def fill(self, a: Tensor, b: Tensor, base: Base, config: Any) -> None:
        nn.init.normal_(a, std=1 / config.r)
        nn.init.zeros_(b)


class FromWeight(Init):
    """A start that is computed from W as a matrix (out, in * kernel), in float32."""

    def pair(self, w: Tensor, base: Base, config: Any) -> tuple[Tensor, Tensor]:
        """(r, in * kernel), (out, r)."""
        raise NotImplementedError

    def fill(self, a: Tensor, b: Tensor, base: Base, config: Any) -> None:
        if base.groups > 1:
            raise UnsupportedError(
                f"init_lora_weights={config.init_lora_weights!r} on a convolution with groups: B A "
                "is not a weight of the layer's shape, there is nothing to take W apart into"
            )
        if a.is_meta:
            return
        w = base.read()[0].detach().float().flatten(1)
        if a.shape[0] > min(w.shape):
            raise UnsupportedError(
                f"{_SHOWN.get(str(config.init_lora_weights), config.init_lora_weights)} requires "
                f"`r` <= min(out, in) = {min(w.shape)}, got r = {a.shape[0]}"
            )
        left, right = self.pair(w, base, config)
        with torch.no_grad():
            a.copy_(left.reshape(a.shape))
            b.copy_(right.reshape(b.shape))
