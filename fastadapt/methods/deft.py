# SPDX-License-Identifier: Apache-2.0
"""DEFT:  W' = W - Q C^T W + s Q R,  takes a subspace of the outputs away and puts Q R there.

    P: (out, r)  R: (r, in);  "relu": Q = P, C = relu(P);  "qr": Q = C = the orthonormal P
    s = alpha / r, or 1; R starts at C^T W / s, so that the start is the identity

``para`` leaves R out (PaRa: pure removal, never the identity). The removal is applied to the
output: y' = y + (s R drop(x) - C^T (y - bias)) Q, three thin products.
Source: DEFT (arXiv 2412.03293), PaRa (arXiv 2406.05641).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.pair import drop_part
from fastadapt.ops.precision import compute_dtype, product_dtype


@dataclass
class DeftConfig(AdapterConfig):
    """PEFT's DeftConfig.

    r: the rank, capped at the output channels; decomposition_method: "relu" or "qr"; init_scale:
    of a random R; alpha: of s; para: no R; deft_dropout: on R's input, in [0, 1); bias: "none",
    "all" or "deft_only".
    """

    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.DEFT  # type: ignore[attr-defined]
        fields.count(self, "r")
        if self.decomposition_method not in ("qr", "relu"):
            raise ConfigError(
                f"Unknown decomposition_method {self.decomposition_method!r}, must be one of "
                "['qr', 'relu']."
            )
        fields.rate(self, "deft_dropout")
        fields.choice(self, "bias", ("none", "all", "deft_only"))


class Deft(Adapter):
    name, prefix, Config = "deft", "deft_", DeftConfig

    def build(self, base: Base, shared: Any) -> None:
        config: DeftConfig = self.config
        n = base.shape[0]
        r = min(config.r, n)
        self.parts = {"deft_P": nn.Parameter(torch.empty(n, r).normal_(0.0, 0.02))}
        if not config.para:
            injected = nn.Parameter(torch.zeros(r, *base.shape[1:]))
            if not config.init_weights:
                nn.init.normal_(injected, mean=0.0, std=0.02 * config.init_scale)
            self.parts["deft_R"] = injected
        self.parts["deft_dropout"] = drop_part(config.deft_dropout)
        self.values = {
            "deft_r": r, "deft_decomposition": config.decomposition_method,
            "deft_init_scale": config.init_scale, "deft_para": config.para,
            "deft_scaling": config.alpha / r if config.alpha else 1.0,
        }  # fmt: skip
        self.identity_at_init = config.init_weights and not config.para  # type: ignore[misc]

    def start(self, base: Base) -> None:
        if self.config.para or not self.config.init_weights or self["deft_P"].is_meta:
            return
        with torch.no_grad():
            w = base.read()[0].flatten(1)
            taken = self._projector()[1].t() @ w.to(torch.promote_types(w.dtype, torch.float32))
            self["deft_R"].copy_((taken / self["deft_scaling"]).view(self["deft_R"].shape))

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q, c = self._projector()
        w = w.to(torch.promote_types(w.dtype, q.dtype))
        rows = w.flatten(1)
        inner = -(c.t() @ rows)
        if not self["deft_para"]:
            inner = inner + self["deft_R"].flatten(1) * self["deft_scaling"]
        return (rows + q @ inner).view(w.shape), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        p = self.rate("deft_dropout")
        q, c = self._projector()
        if len(base.shape) > 2:
            y = super().forward(x, base)
            if p == 0 or self["deft_para"]:
                return y
            injected = torch.tensordot(q, self["deft_R"] * self["deft_scaling"], 1)
            return y + base.apply(base.drop(x, p) - x, injected.to(x.dtype))
        if base.whole and p == 0:
            # C^T W is as small as R: one pair, and nothing but x and A x is kept for backward
            with torch.autocast(x.device.type, enabled=False):
                low = product_dtype(compute_dtype(x), x.device)
                a = -(c.to(low).t() @ base.read()[0].to(low))
                if not self["deft_para"]:
                    a = a + (self["deft_R"] * self["deft_scaling"]).to(low)
            return base.low_rank(x, a, q, 1.0)
        y = base(x)
        low = product_dtype(y.dtype, y.device)
        with torch.autocast(y.device.type, enabled=False):
            q, c, rows = q.to(low), c.to(low), y.to(low)
            h = -(rows @ c)
            if base.bias is not None:
                h = h + base.bias.to(low) @ c
            if not self["deft_para"]:
                r = (self["deft_R"] * self["deft_scaling"]).to(low)
                kept = base.drop(x, p)
                h = h + base.apply(kept.to(low) if kept.is_floating_point() else kept, r)
            return (rows + h @ q.t()).to(y.dtype)

    def _projector(self) -> tuple[Tensor, Tensor]:
        """(Q, C), at least in float32, where a QR is sound."""
        p: Tensor = self["deft_P"]
        p = p.to(torch.promote_types(p.dtype, torch.float32))
        if self["deft_decomposition"] == "relu":
            return p, p.relu()
        q = torch.linalg.qr(p)[0]
        return q, q
