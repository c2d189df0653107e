# SPDX-License-Identifier: Apache-2.0
"""VeRA:  W' = W + diag(b) B diag(d) A,  A and B random, frozen and the same for all layers.

    A: (r, in * kernel)  B: (out, r)  d: (r,), starts at d_initial  b: (out,), starts at 0

A and B have the largest sizes among the layers; a layer takes their first rows and columns.
Neither x nor the output is kept for backward, only two tensors of r columns: A is frozen, and the
gradient of b comes from that of diag(b) B.
Source: VeRA (arXiv 2310.11454).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.methods import fields
from fastadapt.methods.pair import PairAdapter, drop_part
from fastadapt.methods.projection import generator, largest, near, size, uniform
from fastadapt.ops.precision import compute_dtype, product_dtype
from fastadapt.targets import DEFAULT_TARGETS


@dataclass
class VeraConfig(AdapterConfig):
    """PEFT's VeraConfig.

    r: columns of the projections; projection_prng_key: their seed; save_projection: files hold
    them; vera_dropout: on the input of A; d_initial: start of d; bias: "none", "all" or
    "vera_only"; init_weights: False starts d at random and b at 1. ``fan_in_fan_out`` has no
    effect: layers know how they store W.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    without = ("exclude_modules",)
    default_targets = {**DEFAULT_TARGETS, "phi": ["q_proj", "v_proj"]}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VERA  # type: ignore[attr-defined]
        fields.count(self, "r")
        fields.rate(self, "vera_dropout")
        fields.choice(self, "bias", ("none", "all", "vera_only"))
        fields.projections_kept(self, "vera_A and vera_B", "projection_prng_key")


class Vera(PairAdapter):
    name, prefix, Config = "vera", "vera_lambda_", VeraConfig
    must_agree: ClassVar = {
        "projection_prng_key": "Vera PRNG initialisation key must be the same for all adapters",
        "save_projection": "VeRA projection weights must be saved for all adapters or none",
    }
    constant = ("vera_A", "vera_B")
    dropout = "vera_dropout"

    @classmethod
    def shared(cls, config: VeraConfig, bases: dict[str, Base]) -> dict[str, nn.Parameter]:
        out, width = largest(bases.values())
        source = generator(config.projection_prng_key)
        a = uniform(config.r, width, source)
        return {"vera_A": a, "vera_B": uniform(out, config.r, source)}

    def build(self, base: Base, shared: Any) -> None:
        config: VeraConfig = self.config
        self.identity_at_init = config.init_weights  # type: ignore[misc]
        b, d = torch.ones(base.shape[0]), torch.randn(config.r)
        if config.init_weights:
            b.zero_()
            d.fill_(config.d_initial)
        self.parts = {
            "vera_dropout": drop_part(config.vera_dropout), "vera_lambda_b": nn.Parameter(b),
            "vera_lambda_d": nn.Parameter(d), **shared,
        }  # fmt: skip
        self.values = {"r": config.r}

    def file_key(self, part: str, leaf: str) -> str | None:
        if part not in self.constant:
            return super().file_key(part, leaf)
        return f"/{part}" if self.config.save_projection else None

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        a, b = self._corner(shape)
        return self["vera_lambda_d"][:, None] * a, self["vera_lambda_b"][:, None] * b

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if base.groups > 1:
            return super().forward(x, base)
        a, b = self._corner(base.shape)
        d, scale = self["vera_lambda_d"], self["vera_lambda_b"]
        y, kept = base(x), base.drop(x, self.rate("vera_dropout"))
        kind = a.dtype if base.indexed else product_dtype(compute_dtype(x), x.device)
        kept = kept if base.indexed else kept.to(kind)
        h = base.apply(kept, a.to(kind).view(-1, *base.shape[1:])) * base.channels(d.to(kind))
        return y + base.mix(h, (scale[:, None] * b).to(kind)).to(y.dtype)

    def _corner(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The parts of A and B that serve a weight of this shape."""
        out, width = size(shape)
        own = self["vera_lambda_d"]
        return near(self["vera_A"], own)[:, :width], near(self["vera_B"], own)[:out]
