# SPDX-License-Identifier: Apache-2.0
"""GraLoRA:  W' = W + s Delta,  Delta in k x k blocks, each of rank r / k:  Delta_ji = B_ji A_ij.

    gralora_A: (k, in / k, r)  gralora_B: (k, r, out / k), s = alpha / (r + hybrid_r)

Block (j, i) takes columns j r/k .. of A_i and rows i r/k .. of B_j. ``hybrid_r`` adds a plain LoRA
of that rank. For k <= 2 all of it is one low-rank product of rank k r (its zeros cost less than
moving blocks); beyond, blocks are multiplied as blocks.
Source: GraLoRA (arXiv 2505.20355).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import DeltaAdapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, UnsupportedError
from fastadapt.methods import fields
from fastadapt.methods.pair import drop_part
from fastadapt.ops.precision import compute_dtype, product_dtype


@dataclass
class GraloraConfig(AdapterConfig):
    """PEFT's GraloraConfig.

    r: the rank, a multiple of gralora_k; hybrid_r: the rank of the plain LoRA beside; alpha: of s;
    gralora_k: blocks each way; gralora_dropout: on the input, in [0, 1); bias: "none", "all" or
    "gralora_only".
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    without = ("exclude_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.GRALORA  # type: ignore[attr-defined]
        if self.r <= 0 or self.hybrid_r < 0:
            raise ConfigError(
                "`r` should be a positive and `hybrid_r` a non-negative integer value but the "
                f"values passed are {self.r} and {self.hybrid_r}"
            )
        if self.gralora_k <= 0:
            raise ConfigError(
                "`gralora_k` should be a positive integer value but the value passed is "
                f"{self.gralora_k}"
            )
        if self.r % self.gralora_k:
            raise ConfigError(
                f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}"
            )
        fields.rate(self, "gralora_dropout")
        fields.choice(self, "bias", ("none", "all", "gralora_only"))


class Gralora(DeltaAdapter):
    name, prefix, Config = "gralora", "gralora_", GraloraConfig

    def build(self, base: Base, shared: Any) -> None:
        config: GraloraConfig = self.config
        n, k, blocks, r = base.shape[0], math.prod(base.shape[1:]), config.gralora_k, config.r
        for side, size in (("in", k), ("out", n)):
            if size % blocks:
                raise UnsupportedError(
                    f"{side}_features should be divisible by gralora_k, but got {size} and {blocks}"
                )
        a, b = torch.zeros(blocks, r, k // blocks), torch.zeros(blocks, n // blocks, r)
        for i in range(blocks):
            nn.init.kaiming_uniform_(a[i], a=math.sqrt(5))
            if not config.init_weights:
                nn.init.kaiming_uniform_(b[i], a=math.sqrt(5))
        plain: tuple[nn.Module, nn.Module] = nn.Identity(), nn.Identity()
        if config.hybrid_r:
            down, up = nn.Linear(k, config.hybrid_r, False), nn.Linear(config.hybrid_r, n, False)
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
            if not config.init_weights:
                nn.init.kaiming_uniform_(up.weight, a=math.sqrt(5))
            plain = down, up
        self.parts = {
            "gralora_dropout": drop_part(config.gralora_dropout),
            "gralora_A": nn.Parameter(a.transpose(1, 2).contiguous()),
            "gralora_B": nn.Parameter(b.transpose(1, 2).contiguous()),
            "gralora_A_general": plain[0], "gralora_B_general": plain[1],
        }  # fmt: skip
        self.values = {
            "r": r, "hybrid_r": config.hybrid_r, "alpha": config.alpha, "gralora_k": blocks,
            "scaling": config.alpha / (r + config.hybrid_r),
        }  # fmt: skip
        self._shape = base.shape
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def delta(self) -> Tensor:
        a, b = self._pair()
        scale: float = self["scaling"]
        return ((b * scale) @ a).view(self._shape)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        p, scale = self.rate("gralora_dropout"), self["scaling"]
        if base.groups > 1:
            return base(x) + base.apply(base.drop(x, p), self.delta().to(x.dtype))
        if self["gralora_k"] <= 2 or base.indexed or len(self._shape) > 2 or self["hybrid_r"]:
            a, b = self._pair()
            return base.low_rank(x, a.view(-1, *self._shape[1:]), b, scale, p)
        y = base(x)
        kind = compute_dtype(x)
        low, blocks = product_dtype(kind, x.device), self["gralora_k"]
        a, b = self["gralora_A"].to(low), (self["gralora_B"] * scale).to(low)
        with torch.autocast(x.device.type, enabled=False):
            rows = base.drop(x, p).to(low).reshape(-1, blocks, a.shape[1]).transpose(0, 1)
            h = torch.bmm(rows, a).unflatten(2, (blocks, -1)).permute(2, 1, 0, 3).flatten(2)
            return y + torch.bmm(h, b).transpose(0, 1).reshape(y.shape).to(y.dtype)

    def _pair(self) -> tuple[Tensor, Tensor]:
        """The blocks as one pair: (k r + hybrid_r, in), (out, k r + hybrid_r)."""
        blocks: int = self["gralora_k"]
        # row (i, j, q) of A reads block i; column (i, j, q) of B writes block j
        a = torch.block_diag(*self["gralora_A"].transpose(1, 2))
        b = self["gralora_B"].unflatten(1, (blocks, -1))
        wide = b.new_zeros(blocks, blocks, b.shape[2], blocks, b.shape[3])
        wide.diagonal(dim1=1, dim2=3).copy_(b.permute(1, 2, 3, 0))
        b = wide.flatten(0, 2).flatten(1).t()
        if not self["hybrid_r"]:
            return a, b
        plain_a, plain_b = self["gralora_A_general"].weight, self["gralora_B_general"].weight
        return torch.cat([a, plain_a]), torch.cat([b, plain_b], 1)
