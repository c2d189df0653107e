# SPDX-License-Identifier: Apache-2.0
"""KaSA:  W' = W - U_r S_r V_r^T + s B diag(d) A,  with the r smallest singular values of W.

    d: (r,), starts at N(0, 1)

PEFT takes U_r S_r V_r^T out of the base for good. Here the base stays and the adapter holds the
two factors, which are not saved: W is there again when the adapter is off or gone, other adapters
stand on W itself, and a quantised base need not be quantised again.
The loss of the paper, ``_get_kasa_loss()``, is the caller's to add:
beta |d|^2 + gamma (||B^T B - I|| + ||A A^T - I||). Source: KaSA (arXiv 2412.06071).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.errors import ConfigError, UnsupportedError
from fastadapt.methods.lora import Lora, refuse_kind

_LEFT, _RIGHT = "lora_kasa_left", "lora_kasa_right"


@dataclass
class KasaConfig:
    """beta, gamma: of the two terms of the loss, at least 0."""

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` must be non-negative, got {getattr(self, name)}.")


class Kasa(Lora):
    name = "kasa"
    identity_at_init = False
    constant = (_LEFT, _RIGHT)

    def build(self, base: Base, shared: Any) -> None:
        refuse_kind(base, "kasa_config", indexed=False)
        (out, width), r = base.shape, self.config.r
        if r >= min(out, width):
            raise UnsupportedError(
                f"KaSA requires `r` ({r}) to be smaller than min(in_features, out_features) "
                f"({min(out, width)}): something of the weight must be left"
            )
        super().build(base, shared)
        self.parts["lora_diag"] = nn.Parameter(torch.randn(r))
        self.parts[_LEFT] = nn.Parameter(torch.zeros(out, r), requires_grad=False)
        self.parts[_RIGHT] = nn.Parameter(torch.zeros(r, width), requires_grad=False)

    def start(self, base: Base) -> None:
        super().start(base)
        r = self.config.r
        u, s, vt = torch.linalg.svd(base.read()[0].detach().float(), full_matrices=False)
        with torch.no_grad():
            self[_LEFT].copy_(u[:, -r:] * s[-r:])
            self[_RIGHT].copy_(vt[-r:])

    def file_key(self, part: str, leaf: str) -> str | None:
        return None if part in self.constant else super().file_key(part, leaf)

    def pair(self) -> tuple[Tensor, Tensor]:
        a, b = super().pair()
        return a, b * self["lora_diag"]

    def delta(self) -> Tensor:
        dropped: Tensor = self[_LEFT] @ self[_RIGHT]
        return super().delta() - dropped

    def forward(self, x: Tensor, base: Base) -> Tensor:
        a, b = self.pair()
        scale, p = self["scaling"], self.rate("lora_dropout")
        left, right = self[_LEFT], self[_RIGHT]
        if p == 0:
            return base.low_rank(x, torch.cat([a, right]), torch.cat([b * scale, -left], 1), 1.0)
        y = base.low_rank(x, a, b, scale, p)
        return y - base.mix(base.apply(x.to(right.dtype), right), left).to(y.dtype)


def kasa_loss(adapters: Iterable[Any]) -> Tensor | float:
    """The paper's loss, summed over the layers of KaSA among ``adapters``."""
    total: Tensor | float = 0.0
    for adapter in adapters:
        if not isinstance(adapter, Kasa):
            continue
        options, d = adapter.config.kasa_config, adapter["lora_diag"].float()
        a, b = (adapter[f"lora_{part}"].weight.float() for part in "AB")
        eye = torch.eye(d.shape[0], device=d.device)
        orthogonal = torch.linalg.norm(b.t() @ b - eye) + torch.linalg.norm(a @ a.t() - eye)
        total = total + options.beta * d.square().sum() + options.gamma * orthogonal
    return total
