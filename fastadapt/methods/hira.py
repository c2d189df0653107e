# SPDX-License-Identifier: Apache-2.0
"""HiRA:  W' = W + W o (B A),  o the product entry by entry: an update of high rank.

    A: (r, in, *kernel)  B: (out, r, 1, ..)

(W o B A) x is a sum of r products with W, so that the dense weight is the cheap form; on embeddings
it is one: W[:, t] o (B A[:, t]).
Source: HiRA (ICLR 2025, https://openreview.net/forum?id=TwJrTz9cRS).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.base import Base, compose
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.dense import DenseAdapter
from fastadapt.methods.pair import drop_part
from fastadapt.targets import pattern_value


@dataclass
class HiraConfig(AdapterConfig):
    """PEFT's HiraConfig.

    r: the rank of B A; hira_dropout: on the update's input; init_weights: True, False or
    "gaussian"; rank_pattern: pattern -> r. ``fan_in_fan_out`` has no effect here.
    """

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HIRA  # type: ignore[attr-defined]
        self.rank_pattern = dict(self.rank_pattern or {})
        fields.count(self, "r")
        fields.rate(self, "hira_dropout")
        fields.choice(self, "init_weights", (True, False, None, "gaussian"))
        for rank in self.rank_pattern.values():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"rank_pattern: expected positive integers, got {rank!r}")

    def at(self, path: str) -> HiraConfig:
        if not self.rank_pattern:
            return self
        return dataclasses.replace(self, r=pattern_value(self.rank_pattern, path, self.r))


class Hira(DenseAdapter):
    name, prefix, Config, dropout = "hira", "hira_", HiraConfig, "hira_dropout"
    _prefix = "hira_"

    def build(self, base: Base, shared: Any) -> None:
        config: HiraConfig = self.config
        (out, inner, *kernel), r = base.shape, config.r
        self._prefix = "hira_embedding_" if base.indexed else "hira_"
        a, b = torch.randn(r, inner, *kernel), torch.randn(out, r, *[1] * len(kernel))
        if config.init_weights and base.indexed:
            a, b = torch.zeros_like(a), nn.init.normal_(b)
        elif config.init_weights:
            gaussian = config.init_weights == "gaussian" and not kernel
            nn.init.normal_(a, std=1 / r) if gaussian else nn.init.kaiming_uniform_(a, math.sqrt(5))
            b = torch.zeros_like(b)
        self.parts = {
            "hira_dropout": drop_part(config.hira_dropout),
            self._prefix + "A": nn.Parameter(a), self._prefix + "B": nn.Parameter(b),
        }  # fmt: skip
        self.values = {"r": r}

    def update(self, w: Tensor) -> Tensor:
        return w * compose(self[self._prefix + "A"], self[self._prefix + "B"]).view(w.shape)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not base.indexed:
            return super().forward(x, base)
        y = base(x)
        a, b = self[self._prefix + "A"], self[self._prefix + "B"]
        return y + (y * F.linear(F.embedding(x, a.t()), b)).to(y.dtype)
