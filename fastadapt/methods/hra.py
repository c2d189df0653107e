# SPDX-License-Identifier: Apache-2.0
"""HRA:  W' = W H_1 .. H_r,  H_i = I - 2 u_i u_i^T / ||u_i||^2, a chain of Householder reflections.

    hra_u: (in, r), the u_i as columns (on a convolution over the whole patch)

The chain is I - U T U^T with T^-1 = I / 2 + triu(U^T U, 1) for unit columns (compact WY), so the
input is reflected by a low-rank product: y = W (x - (x U T^T) U^T). Columns start equal in pairs,
whose reflections cancel. ``apply_GS`` makes the columns orthonormal first: I - 2 P, where P is the
projector on their span; the start is then no identity.
Source: HRA (arXiv 2405.17484).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import FastAdaptWarning
from fastadapt.methods import fields
from fastadapt.ops.reflect import reflect


@dataclass
class HRAConfig(AdapterConfig):
    """PEFT's HRAConfig.

    r: the number of reflections, best even; apply_GS: orthonormal columns; bias: "none", "all" or
    "hra_only"; init_weights: start as the identity.
    """

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HRA  # type: ignore[attr-defined]
        fields.count(self, "r")
        fields.choice(self, "bias", ("none", "all", "hra_only"))


class HRA(Adapter):
    name, prefix, Config = "hra", "hra_", HRAConfig

    def build(self, base: Base, shared: Any) -> None:
        config: HRAConfig = self.config
        k, r = math.prod(base.shape[1:]), config.r
        paired = config.init_weights and r % 2 == 0
        if config.init_weights and not paired:
            warnings.warn(
                f"HRA: r={r} is odd, so the reflections do not cancel in pairs and the start is "
                "not the identity; use an even r",
                FastAdaptWarning, stacklevel=2,
            )  # fmt: skip
        u = torch.zeros(k, r // 2 if paired else r)
        nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        self.parts = {"hra_u": nn.Parameter(u.repeat_interleave(2, 1) if paired else u)}
        self.values = {"hra_r": r, "hra_apply_GS": config.apply_GS}
        self.identity_at_init = paired and not config.apply_GS  # type: ignore[misc]

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        u, ut = self._chain()
        w = w.to(torch.promote_types(w.dtype, u.dtype))
        rows = w.flatten(1)
        return (rows - (rows @ ut) @ u.t()).view(w.shape), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if base.indexed or len(base.shape) > 2:
            return super().forward(x, base)
        u, ut = self._chain()
        return base(reflect(x, u.t(), ut))

    def _chain(self) -> tuple[Tensor, Tensor]:
        """(U, U T), unit columns: the chain is I - U T U^T. No solver takes half precision."""
        u: Tensor = self["hra_u"]
        u = u.float() if u.element_size() < 4 else u
        u = u / u.norm(dim=0)
        gram = u.t() @ u
        eye = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        if not self["hra_apply_GS"]:
            inverse = eye / 2 + gram.triu(1)
            return u, torch.linalg.solve_triangular(inverse, u, upper=True, left=False)
        # a trace of the identity keeps columns that start equal from a division by zero
        steady = gram + 8 * torch.finfo(u.dtype).eps * eye
        return u, 2 * torch.linalg.solve_ex(steady, u, left=False)[0]
