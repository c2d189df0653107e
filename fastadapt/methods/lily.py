# SPDX-License-Identifier: Apache-2.0
"""Lily:  y = W x + s (sum_e p_e B_e)^T A x,  p = mean over the tokens of softmax(router(A x)).

    A: (r, in), shared by ``stride_A`` layers in a row; B: (num_B r, out), shared by all layers
    router: (num_B, r); layers share with layers of the same target name and shape

p depends on the input, so nothing can be merged.
Source: Lily (arXiv 2407.09946).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, UnsupportedError
from fastadapt.methods import fields
from fastadapt.ops.precision import compute_dtype, product_dtype


@dataclass
class LilyConfig(AdapterConfig):
    """PEFT's LilyConfig.

    r: the rank; stride_A: layers that share an A; num_B: experts, at least 2; scaling: s.
    """

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LILY  # type: ignore[attr-defined]
        fields.count(self, "r")
        if self.stride_A < 1:
            raise ConfigError("`stride_A` must be at least 1.")
        if self.num_B < 2:
            raise ConfigError("`num_B` must be at least 2 for the router to be trained.")


class Lily(Adapter):
    name, prefix, Config = "lily", "lily_", LilyConfig

    @classmethod
    def shared(cls, config: LilyConfig, bases: dict[str, Base]) -> dict[int, dict[str, Any]]:
        """id of a base -> {"A": cell, "B": cell}; the first layer of a cell fills it."""
        groups: dict[Any, list[Base]] = {}
        for path, base in bases.items():
            wanted = config.target_modules
            if isinstance(wanted, str) or wanted is None:
                name = str(wanted)
            else:
                name = max((t for t in wanted if path.endswith(t)), key=len, default=path)
            groups.setdefault((name, base.shape), []).append(base)
        found: dict[int, dict[str, Any]] = {}
        for members in groups.values():
            b: list[Any] = []
            for i, base in enumerate(members):
                a = [] if i % config.stride_A == 0 else found[id(members[i - 1])]["A"]
                found[id(base)] = {"A": a, "B": b}
        return found

    def build(self, base: Base, shared: dict[int, dict[str, Any]]) -> None:
        config: LilyConfig = self.config
        if base.groups > 1:
            raise UnsupportedError(
                "Lily on a grouped convolution: the shared B would mix the groups"
            )
        n, k, r = base.shape[0], math.prod(base.shape[1:]), config.r
        a, b = nn.Linear(k, r, bias=False), nn.Linear(n, config.num_B * r, bias=False)
        router = nn.Linear(r, config.num_B, bias=False)
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(router.weight, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(b.weight)
        else:
            nn.init.kaiming_uniform_(b.weight, a=math.sqrt(5))
        cells = shared[id(base)]
        # a layer that shares has drawn its own all the same, as in PEFT
        for cell, module in ((cells["A"], a), (cells["B"], b)):
            if not cell:
                cell.append(module)
        self.parts = {"lily_A": cells["A"][0], "lily_B": cells["B"][0], "lily_router": router}
        self.values = {"r": r, "scaling": config.scaling, "stride_A": config.stride_A,
                       "num_B": config.num_B}  # fmt: skip
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise UnsupportedError(
            "Lily cannot be merged: its update depends on the input, by the router"
        )

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        kind = compute_dtype(x) if x.is_floating_point() else y.dtype
        low = product_dtype(kind, y.device)
        a, b = self["lily_A"].weight.to(low), self["lily_B"].weight
        with torch.autocast(y.device.type, enabled=False):
            x = x.to(low) if x.is_floating_point() else x
            h = base.apply(x, a.view(-1, *base.shape[1:]))
            last = h if len(base.shape) == 2 else h.movedim(-len(base.shape) + 1, -1)
            logits = last @ self["lily_router"].weight.to(low).t()
            chances = logits.float().softmax(-1).flatten(0, -2).mean(0)
            experts = b.view(self["num_B"], -1, b.shape[1])
            mixed = torch.tensordot(chances.to(b.dtype), experts, 1) * self["scaling"]
            return y + base.mix(h, mixed.t().to(low)).to(y.dtype)
