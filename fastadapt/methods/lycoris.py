# SPDX-License-Identifier: Apache-2.0
"""What LoHa and LoKr share: their fields, and dropout of output rows and of whole layers.

In training  y = base(x) + keep * (delta W x),  keep: (out,), zero for a dropped row, all zero with
probability ``module_dropout``; nothing waits for the draw, so that graphs can be captured.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.dense import DenseDelta
from fastadapt.targets import pattern_value


@dataclass
class LycorisConfig(AdapterConfig):
    """r: the rank; alpha: s = alpha / r; rank_dropout: of output rows; module_dropout: of a layer's
    whole update; use_effective_conv2d: a core tensor for convolutions with a kernel above 1."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    r: int = 8
    alpha: int | float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: Any = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        fields.count(self, "r")
        for rank in self.rank_pattern.values():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"rank_pattern: expected positive integers, got {rank!r}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise ConfigError(f"alpha: expected a finite number, got {alpha!r}")
        fields.rate(self, "rank_dropout")
        fields.rate(self, "module_dropout")

    def at(self, path: str) -> Self:
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        r = pattern_value(self.rank_pattern, path, self.r)
        return dataclasses.replace(self, r=r, alpha=pattern_value(
            self.alpha_pattern, path, self.alpha))  # fmt: skip

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / self.r


class Lycoris(DenseDelta):
    rescaled = True
    """Rows that are kept grow by what was dropped."""

    def plain_values(self) -> dict[str, Any]:
        """PEFT's per-adapter attributes."""
        config: LycorisConfig = self.config
        names = ("r", "alpha", "scaling", "rank_dropout", "module_dropout")
        return {name: getattr(config, name) for name in names}

    def keep(self, base: Base) -> Tensor | None:
        """The factor of each output row, or None where nothing is dropped."""
        rows, module = self["rank_dropout"], self["module_dropout"]
        if self._layer is None or not self._layer.training or not (rows or module):
            return None
        like, out = self._trained()[0], base.shape[0]
        kept = torch.ones(out, dtype=like.dtype, device=like.device)
        if rows:
            kept = (torch.rand_like(kept) > rows).to(kept.dtype)
            if self.rescaled:
                kept = kept / kept.mean().clamp(min=1 / out)
        if module:
            kept = kept * (torch.rand(1, device=like.device) > module).to(kept.dtype)
        return kept

    def dense(self, x: Tensor, base: Base, kept: Tensor | None) -> Tensor:
        """base(x) + kept * (delta W x) with delta W in full."""
        if kept is None:
            return super().forward(x, base)
        y = base(x)
        return y + (self.beside(x, base, y.dtype) * base.channels(kept)).to(y.dtype)


def uniform_(*tensors: Tensor) -> None:
    """PEFT's start values, in the order of its draws."""
    for tensor in tensors:
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def core_product(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A convolution's weight from a core tensor: core: (r, r, *kernel)  a: (r, out)  b: (r, in)
    -> (out, in, *kernel)."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)


def core_shape(r: int, kernel: list[int]) -> tuple[int, ...]:
    """PEFT's core of a conv1d has a second kernel axis of length 1."""
    return (r, r, *kernel, *([1] if len(kernel) == 1 else []))
