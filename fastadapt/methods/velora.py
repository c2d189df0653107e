# SPDX-License-Identifier: Apache-2.0
"""VeLoRA:  LoRA whose backward keeps, of each input of A, one number a group of features.

    x ~ scale (x e) e^T a group;  e: (in / groups,), of norm 1

The map is LoRA's; only the gradient of A is an estimate. e is the mean of the groups of the batch
("batch_average"), of the first batch ("batch_average_once") or random.
Source: VeLoRA (arXiv 2405.17991).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.lora import Lora, refuse_kind
from fastadapt.ops.velora import grouped, velora_linear


@dataclass
class VeloraConfig:
    """num_groups: of features; scale: of the gradient's estimate; init_type: where e is from."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        fields.count(self, "num_groups", needs="should be positive, got")
        if self.init_type not in ("batch_average_once", "batch_average", "random"):
            raise ConfigError(
                f"Unsupported `init_type` {self.init_type!r}. Supported values are "
                "'batch_average_once', 'batch_average', and 'random'."
            )
        if not self.scale > 0:
            raise ConfigError(f"`scale` should be positive, got {self.scale}.")


class Velora(Lora):
    name = "velora"
    constant = ("lora_velora_embed",)

    def build(self, base: Base, shared: Any) -> None:
        refuse_kind(base, "velora_config", indexed=False)
        super().build(base, shared)
        options = self.config.velora_config
        size = -(-base.shape[1] // options.num_groups)
        once = options.init_type == "random"
        e = _unit(torch.randn(size)) if once else torch.zeros(size)
        self.parts["lora_velora_embed"] = nn.Parameter(e, requires_grad=False)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        layer = self._layer
        if layer is None or not (layer.training and torch.is_grad_enabled()):
            return super().forward(x, base)
        options, (a, b) = self.config.velora_config, self.pair()
        y = base(x)
        x = base.drop(x, self.rate("lora_dropout")).to(a.dtype)
        e: Tensor = self["lora_velora_embed"]
        if options.init_type == "batch_average" or (
            options.init_type == "batch_average_once" and not e.any()
        ):
            with torch.no_grad():
                groups = grouped(x.detach(), options.num_groups)
                e.copy_(_unit(groups.flatten(0, 1).mean(0)))
        # the op keeps what it is given: a later batch changes e in place
        h = velora_linear(x, a, e.clone(), options.num_groups, options.scale)
        scale: float = self["scaling"]
        return y + (base.mix(h, b) * scale).to(y.dtype)


def _unit(e: Tensor) -> Tensor:
    """e / |e|, the ones where e is zero."""
    e = e.float()
    e = torch.where((e == 0).all(), torch.ones_like(e), e)
    unit: Tensor = e / torch.linalg.vector_norm(e)
    return unit
