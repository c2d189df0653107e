# SPDX-License-Identifier: Apache-2.0
"""LoRA on a parameter:  W'_e = W_e + s B_e A_e  for each matrix e of a stack (experts), or for one.

    W: (out, in) or (experts, out, in)  A: (experts r, in)  B: (out, r experts)

Row e r + i of A is row i of A_e, column i experts + e of B is column i of B_e, as in PEFT's files.
The module's forward reads W' itself, so there is no x that A could be applied to: W' is made in the
dtype of W, by one batched product without a delta beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.combine import Recipe
from fastadapt.errors import ConfigError, UnsupportedError
from fastadapt.methods.lora import Lora
from fastadapt.methods.lora_config import VARIANTS, LoraConfig

_ANY_SHAPE = ("true", "false", "gaussian", "eva")


class LoraStack(Lora):
    def build(self, base: Base, shared: Any) -> None:
        config: LoraConfig = self.config
        self.check(config)
        self.experts = base.shape[0] if len(base.shape) == 3 else 1
        start = str(config.init_lora_weights).lower()
        if len(base.shape) == 3 and start not in _ANY_SHAPE:
            raise UnsupportedError(
                f"init_lora_weights={config.init_lora_weights!r} on a stack of {self.experts} "
                "matrices: it starts from one matrix; use True, False or 'gaussian'"
            )
        super().build(base, shared)

    def check(self, config: LoraConfig) -> None:
        """Raise ConfigError for fields that cannot be on it."""
        refuse_fields(config)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A: (experts, r, in), B: (experts, out, r)."""
        a, b = self.pair()
        a = a.unflatten(0, (self.experts, -1))
        return a, b.unflatten(1, (-1, self.experts)).permute(2, 0, 1)

    def delta(self) -> Tensor:
        a, b = self.factors()
        delta: Tensor = torch.bmm(b, a) * self["scaling"]
        return delta if self.experts > 1 else delta[0]

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.factors()
        # 8-bit weights are widened to what the pair has, others keep their dtype under autocast too
        dtype = w.dtype if w.dtype.itemsize > 1 else a.dtype
        stack = w.to(dtype).view(-1, *w.shape[-2:]) if w.dim() == 2 else w.to(dtype)
        with torch.autocast(w.device.type, enabled=False):
            scaled = torch.baddbmm(
                stack, b.to(w.device, dtype), a.to(w.device, dtype), alpha=self["scaling"]
            )
        return scaled.view(w.shape) if w.dim() == 2 else scaled, bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        raise UnsupportedError("a parameter is not called: its module reads the merged weight")


class LoraInside(LoraStack):
    """On a weight of a layer that multiplies by it itself; the layer has checked the fields."""

    def check(self, config: LoraConfig) -> None:
        return


class LoraOutput(Lora):
    """W' = W + 2 s B A, on attention's output projection: PEFT 0.21 merges that update twice, and
    what its files hold was trained so. The gradient is that of this W'; PEFT's is half of it."""

    def delta(self) -> Tensor:
        return 2 * super().delta()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return Adapter.forward(self, x, base)

    def combine(self, sources: list[tuple[Adapter, float]], recipe: Recipe, base: Base) -> None:
        super().combine(sources, recipe, base)
        if recipe.svd:
            # it was made from updates that count twice already
            with torch.no_grad():
                self.pair()[1].mul_(0.5)


def refuse_fields(config: LoraConfig) -> None:
    """Raise ConfigError, in PEFT's words, for what cannot be on a parameter."""
    asked = {
        "lora_dropout != 0.": config.lora_dropout,
        "fan_in_fan_out.": config.fan_in_fan_out,
        "lora_bias=True.": config.lora_bias,
        "use_dora=True.": config.use_dora,
        "LoRA variants like DoRA.": any(getattr(config, name) for name in VARIANTS),
    }
    for what, is_set in asked.items():
        if is_set:
            raise ConfigError(f"lora.ParamWrapper does not work with {what}")
