# SPDX-License-Identifier: Apache-2.0
"""MiSS:  W'[o, i] = W[o, i] + D[i mod r, o]: a block of r input channels, repeated.

    D: (r, out); "mini": D is (r, mini_r), repeated over the outputs

W' x = W x + D^T (the sum of x over its blocks of r channels). "bat" (once Bone's) has a block for
each r outputs, D: (out / r, r, r), and W'_oi = W_oi + (W_oi + 1) D_o for each (r, r) block of W: it
has W between, so that the weight is made. Bone's files are MiSS files with other names.
Sources: MiSS (arXiv 2409.15371), Bone (its first version).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.dense import DenseAdapter
from fastadapt.methods.pair import drop_part
from fastadapt.ops.precision import compute_dtype


@dataclass
class MissConfig(AdapterConfig):
    """PEFT's MissConfig.

    r: the block's length in input channels; mini_r: outputs of "mini"; miss_dropout: on the
    update's input; init_weights: True (D = 0), False (at random), "bat" or "mini".
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MISS  # type: ignore[attr-defined]
        fields.count(self, "r", "mini_r")
        fields.rate(self, "miss_dropout")
        fields.choice(self, "init_weights", (True, False, "bat", "mini"))
        fields.choice(self, "bias", ("none", "all", "MiSS_only"))


class Miss(DenseAdapter):
    converts = True
    name, prefix, Config, dropout = "miss", "miss_", MissConfig, "miss_dropout"
    old_parts: ClassVar[dict[str, str | None]] = {"bone_block": "miss_block"}

    @classmethod
    def variant(cls, config: MissConfig) -> type[Adapter]:
        return Bat if config.init_weights == "bat" else cls

    def build(self, base: Base, shared: Any) -> None:
        config: MissConfig = self.config
        out, inner, r = base.shape[0], base.shape[1], config.r
        if r > inner:
            raise ConfigError(f"`r` ({r}) must be less than or equal to in_features ({inner})")
        self._fill(self._shape(out, math.prod(base.shape[1:]), config))

    def _fill(self, shape: tuple[int, ...]) -> None:
        config: MissConfig = self.config
        block = nn.Parameter(torch.zeros(*shape))
        if config.init_weights is False:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        self.parts = {"miss_dropout": drop_part(config.miss_dropout), "miss_block": block}
        self.values = {"miss_r": config.r, "miss_mini_r": config.mini_r}

    @staticmethod
    def _shape(out: int, width: int, config: MissConfig) -> tuple[int, ...]:
        if config.init_weights != "mini":
            return config.r, out
        if out % config.mini_r:
            raise ConfigError(f"mini_r: expected a divisor of {out} outputs, got {config.mini_r}")
        return config.r, config.mini_r

    def block(self, out: int) -> Tensor:
        """D: (r, out)."""
        block: Tensor = self["miss_block"]
        repeated: Tensor = block.repeat(1, out // block.shape[1])
        return repeated

    def update(self, w: Tensor) -> Tensor:
        out, inner, *kernel = w.shape
        block = self.block(out).t()
        tiled = block.repeat(1, -(-inner // block.shape[1]))[:, :inner]
        return tiled.view(out, inner, *[1] * len(kernel)).expand(w.shape).to(w.dtype)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        block = self.block(base.shape[0])
        r = block.shape[0]
        if base.indexed:
            y = base(x)
            return y + base.apply(x % r, block.t()).to(y.dtype)
        if len(base.shape) > 2:
            return super().forward(x, base)
        y, work = base(x), compute_dtype(x)
        x = base.drop(x, self.rate("miss_dropout"))
        x = F.pad(x, (0, -x.shape[-1] % r))
        folded = x.unflatten(-1, (-1, r)).sum(-2, dtype=torch.promote_types(work, torch.float32))
        extra: Tensor = folded.to(work) @ block.to(work)
        return y + extra.to(y.dtype)


class Bat(Miss):
    name = "miss_bat"
    dropout = ""
    """PEFT has none here, whatever ``miss_dropout`` says."""

    @staticmethod
    def _shape(out: int, width: int, config: MissConfig) -> tuple[int, ...]:
        if out % config.r or width % config.r:
            raise ConfigError(
                f'init_weights="bat": expected r to divide W, ({out}, {width}), got r={config.r}'
            )
        return out // config.r, config.r, config.r

    def update(self, w: Tensor) -> Tensor:
        block: Tensor = self["miss_block"]
        r = block.shape[-1]
        # (out blocks, rows, in blocks, columns): each row of blocks has its own D
        rows = w.reshape(w.shape[0] // r, -1, r)
        made = (rows @ block).view(w.shape[0] // r, r, -1, r) + block.unsqueeze(2)
        return made.reshape(w.shape)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return DenseAdapter.forward(self, x, base)
