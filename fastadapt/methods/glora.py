# SPDX-License-Identifier: Apache-2.0
"""GLoRA:  W' = W + W * A + B,  bias' = bias + bias * D + E + W C.

    A, B: (out, in) of rank r ("lora"), (out, 1) ("vector"), one number ("constant") or 0 ("none")
    C: (in, 1), of inner width r ("lora"), plain ("vector") or 0;  D, E: (out,), one number or 0

C, D and E are 0 on a layer without bias. Where A and B are one value a row, only outputs are
scaled; W * A of rank r is no low-rank update, so W' is made, and a step has a third full product.
Source: GLoRA (arXiv 2306.07967).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.dense import DenseAdapter

_FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}


@dataclass
class GloraConfig(AdapterConfig):
    """PEFT's GloraConfig.

    r: of the "lora" forms; config_A_B, config_C, config_D_E: see the module's first lines;
    bias: "none", "all" or "glora_only".
    """

    r: int = 8
    bias: str = "none"
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True

    without = ("exclude_modules", "layers_to_transform", "layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.GLORA  # type: ignore[attr-defined]
        for name, forms in _FORMS.items():
            if getattr(self, name) not in forms:
                raise ConfigError(
                    f"Invalid {name} value: {getattr(self, name)!r}. Valid values are: "
                    f"{', '.join(sorted(forms))}."
                )
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r <= 0:
            raise ConfigError(f"`r` should be a positive integer, got {self.r!r}")
        fields.choice(self, "bias", ("none", "all", "glora_only"))


class Path(nn.Module):
    """One of A .. E, with PEFT's names: Xd Xu ("lora"), X, or zeros."""

    def __init__(self, form: str, shape: tuple[int, ...], r: int, init: bool) -> None:
        super().__init__()
        self.form = form
        if form == "lora":
            self.Xd = nn.Parameter(torch.zeros(shape[0], r))
            self.Xu = nn.Parameter(torch.zeros(r, shape[1]))
            nn.init.kaiming_uniform_(self.Xu, a=math.sqrt(5))
            if not init:
                nn.init.kaiming_uniform_(self.Xd, a=math.sqrt(5))
        elif form == "none":
            # files of PEFT hold these
            self.register_buffer("zeros", torch.zeros(shape))
        else:
            column = (shape[0], 1) if len(shape) == 2 else shape
            self.X = nn.Parameter(torch.zeros(column if form == "vector" else 1))
            if not init and form == "vector":
                row = self.X if self.X.dim() > 1 else self.X.unsqueeze(0)
                nn.init.kaiming_uniform_(row, a=math.sqrt(5))
            elif not init:
                nn.init.normal_(self.X, mean=0.0, std=0.02)

    def forward(self) -> Tensor:
        if self.form == "lora":
            return self.Xd @ self.Xu
        return self.zeros if self.form == "none" else self.X  # type: ignore[return-value]


class Glora(DenseAdapter):
    name, prefix, Config = "glora", "glora_", GloraConfig

    def build(self, base: Base, shared: Any) -> None:
        config: GloraConfig = self.config
        n, k = base.shape[0], math.prod(base.shape[1:])
        biased = base.bias is not None
        forms = {
            "A": (config.config_A_B, (n, k)), "B": (config.config_A_B, (n, k)),
            "C": (config.config_C if biased else "none", (k, 1)),
            "D": (config.config_D_E if biased else "none", (n,)),
            "E": (config.config_D_E if biased else "none", (n,)),
        }  # fmt: skip
        self.parts = {
            f"glora_{key}": Path(form, shape, config.r, config.init_weights)
            for key, (form, shape) in forms.items()
        }
        self.values = {"r": config.r}
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def update(self, w: Tensor) -> Tensor:
        rows, b = w.flatten(1), self["glora_B"]()
        return torch.addcmul(b.expand_as(rows), rows, self["glora_A"]()).view(w.shape)

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        made, _ = super().merged(w, None)
        if bias is None:
            return made, None
        return made, bias + self._shift(bias, w.flatten(1).to(made.dtype) @ self["glora_C"]())

    def forward(self, x: Tensor, base: Base) -> Tensor:
        bias, a, b = base.bias, self["glora_A"], self["glora_B"]
        matrix = not base.indexed and len(base.shape) == 2
        if a.form == "lora" or not matrix:
            y = super().forward(x, base)
        else:
            y = base(x)
            if a.form != "none":
                plain = y if bias is None else y - bias.to(y.dtype)
                y = torch.addcmul(y, plain, a().flatten().to(y.dtype))
                y = y + (x.sum(-1, keepdim=True) * b().flatten().to(x.dtype)).to(y.dtype)
        if bias is None:
            return y
        c = self["glora_C"]
        if c.form == "none":
            moved = torch.zeros_like(bias)
        elif matrix:
            # W C by the layer itself: no weight is decoded for one column
            moved = base(c().t().to(x.dtype))[0] - bias
        else:
            moved = base.read()[0].flatten(1).to(c().dtype) @ c()
        return y + base.channels(self._shift(bias, moved)).to(y.dtype)

    def _shift(self, bias: Tensor, moved: Tensor) -> Tensor:
        """bias' - bias."""
        return torch.addcmul(self["glora_E"]() + moved.flatten(), bias, self["glora_D"]())
