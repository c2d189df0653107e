# SPDX-License-Identifier: Apache-2.0
"""LoHa:  W' = W + s (A1 B1) o (A2 B2),  s = alpha / r,  o the product entry by entry.

    A1, A2: (out, r)  B1, B2: (r, in * kernel)

The update is a pair of rank r^2: its rows b[o, ij] = A1[o, i] A2[o, j], its columns a[ij, k] =
B1[i, k] B2[j, k]. While r^2 (in + out) < in out that pair is applied to x, and delta W never made.
With ``use_effective_conv2d`` each factor is a core (r, r, *kernel) between (r, out) and (r, in).
Source: FedPara (arXiv 2108.06098).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods.lycoris import (
    Lycoris,
    LycorisConfig,
    core_product,
    core_shape,
    empty,
    uniform_,
)  # fmt: skip


@dataclass
class LoHaConfig(LycorisConfig):
    """PEFT's LoHaConfig. init_weights: True starts with B2 = 0; False with all at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOHA  # type: ignore[attr-defined]
        if not isinstance(self.init_weights, bool):
            raise ConfigError(f"init_weights: expected True or False, got {self.init_weights!r}")


class LoHa(Lycoris):
    name, prefix, Config = "loha", "hada_", LoHaConfig

    def build(self, base: Base, shared: Any) -> None:
        config: LoHaConfig = self.config
        (out, inner, *kernel), r = base.shape, config.r
        size = 1
        for length in kernel:
            size *= length
        core = config.use_effective_conv2d and size > 1
        a, b = ((r, out), (r, inner)) if core else ((out, r), (r, inner * size))
        parts = {f"hada_w{i}_{s}": empty(*t) for i in (1, 2) for s, t in (("a", a), ("b", b))}
        uniform_(parts["hada_w1_a"], parts["hada_w1_b"], parts["hada_w2_a"])
        if config.init_weights:
            nn.init.zeros_(parts["hada_w2_b"])
        else:
            uniform_(parts["hada_w2_b"])
        if core:
            for name in ("hada_t1", "hada_t2"):
                parts[name] = empty(*core_shape(r, kernel))
                uniform_(parts[name])
        self.parts = dict(parts)
        self.values = self.plain_values()
        self._core = core
        self._paired = not core and base.groups == 1 and r * r * (out + b[1]) < out * b[1]

    def factor(self, i: int, scale: float = 1.0) -> Tensor:
        """scale A_i B_i."""
        a, b = self[f"hada_w{i}_a"] * scale, self[f"hada_w{i}_b"]
        w: Tensor = core_product(self[f"hada_t{i}"], a, b) if self._core else a @ b
        return w

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        return (self.factor(1, self["scaling"]) * self.factor(2)).view(shape)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        kept = self.keep(base)
        if not self._paired:
            return self.dense(x, base, kept)
        a1, a2, b1, b2 = (self[f"hada_w{i}_{s}"] for s in "ab" for i in (1, 2))
        rows = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
        columns = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
        if kept is not None:
            rows = rows * kept.unsqueeze(1)
        return base.low_rank(x, columns.view(-1, *base.shape[1:]), rows, self["scaling"])
