# SPDX-License-Identifier: Apache-2.0
"""DeLoRA:  W' = W + B D A diag(w),  D_ii = lambda / (r ||A_i|| ||B_i||),  w_j = ||W_:j||.

    A: (r, in, *kernel)  B: (out, r)  lambda: (1,)  w: (in, *kernel), kept as it was at the start

The norms of A's rows and B's columns are taken as at least 1e-4. One low-rank product: D goes into
B, w into A.
Source: DeLoRA (arXiv 2503.18225).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.pair import PairAdapter, drop_part
from fastadapt.targets import pattern_value

_LEAST = 1e-4


@dataclass
class DeloraConfig(AdapterConfig):
    """PEFT's DeloraConfig.

    r: the rank; delora_lambda: the start of lambda, which bounds the update; module_dropout: on
    the update's input, in [0, 1); bias: "none", "all" or "delora_only"; rank_pattern,
    lambda_pattern: pattern -> value.
    """

    r: int = 8
    delora_lambda: int | float = 15
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.DELORA  # type: ignore[attr-defined]
        self.rank_pattern = dict(self.rank_pattern or {})
        self.lambda_pattern = dict(self.lambda_pattern or {})
        for r in (self.r, *self.rank_pattern.values()):
            if isinstance(r, bool) or not isinstance(r, int) or r <= 0:
                raise ConfigError(f"`r` must be a positive integer; got {r!r}.")
        fields.rate(self, "module_dropout")
        fields.choice(self, "bias", ("none", "all", "delora_only"))

    def at(self, path: str) -> DeloraConfig:
        r = pattern_value(self.rank_pattern or {}, path, self.r)
        bound = pattern_value(self.lambda_pattern or {}, path, self.delora_lambda)
        return dataclasses.replace(self, r=r, delora_lambda=bound)


class Delora(PairAdapter):
    name, prefix, Config = "delora", "delora_", DeloraConfig
    constant = ("delora_w_norm",)
    dropout = "delora_dropout"

    def build(self, base: Base, shared: Any) -> None:
        config: DeloraConfig = self.config
        a, b = torch.zeros(config.r, *base.shape[1:]), torch.zeros(base.shape[0], config.r)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        self.parts = {
            "delora_dropout": drop_part(config.module_dropout),
            "delora_A": nn.Parameter(a), "delora_B": nn.Parameter(b),
            "delora_lambda": nn.Parameter(torch.full((1,), float(config.delora_lambda))),
            "delora_w_norm": nn.Parameter(torch.ones(base.shape[1:]), requires_grad=False),
        }  # fmt: skip
        self.values = {"r": config.r}
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def start(self, base: Base) -> None:
        norm = self["delora_w_norm"]
        if not norm.is_meta:
            w = base.read()[0]
            with torch.no_grad():
                norm.copy_(torch.linalg.vector_norm(w, dim=0, dtype=norm.dtype))

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        a, b = self["delora_A"], self["delora_B"]
        lengths = a.flatten(1).norm(dim=1).clamp(min=_LEAST) * b.norm(dim=0).clamp(min=_LEAST)
        return (a * self["delora_w_norm"]).flatten(1), b * (
            self["delora_lambda"] / self["r"] / lengths
        )
