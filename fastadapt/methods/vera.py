# SPDX-License-Identifier: Apache-2.0
"""VeRA:  W' = W + diag(b) B diag(d) A,  A and B random, frozen and the same for all layers.

    A: (r, in * kernel)  B: (out, r)  d: (r,), starts at d_initial  b: (out,), starts at 0

A and B have the largest sizes among the layers; a layer takes their first rows and columns.
Neither x nor the output is kept for backward, only A x, which is one product for the layers that
get the same x: A is frozen, and the gradient of b comes from that of diag(b) B.
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
from fastadapt.methods.projection import (
    ScaledFunction,
    generator,
    largest,
    near,
    projected,
    size,
    uniform,
)
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
    converts = True
    name, prefix = "vera", "vera_lambda_"
    Config: ClassVar[type[AdapterConfig]] = VeraConfig
    must_agree: ClassVar = {
        "projection_prng_key": "Vera PRNG initialisation key must be the same for all adapters",
        "save_projection": "VeRA projection weights must be saved for all adapters or none",
    }
    constant = ("vera_A", "vera_B")
    dropout = "vera_dropout"
    times: ClassVar[int] = 1
    """Rows of A for each column of B."""

    @classmethod
    def shared(cls, config: Any, bases: dict[str, Base]) -> dict[str, nn.Parameter]:
        out, width = largest(bases.values())
        source = generator(config.projection_prng_key)
        a = uniform(cls.times * config.r, width, source)
        return dict(zip(cls.constant, (a, uniform(out, config.r, source)), strict=True))

    def build(self, base: Base, shared: Any) -> None:
        config = self.config
        self.identity_at_init = config.init_weights  # type: ignore[misc]
        b, d = torch.ones(base.shape[0]), torch.randn(self.times * config.r)
        if config.init_weights:
            b.zero_()
            d.fill_(config.d_initial)
        self.parts = {
            self.dropout: drop_part(getattr(config, self.dropout)),
            self.prefix + "b": nn.Parameter(b), self.prefix + "d": nn.Parameter(d), **shared,
        }  # fmt: skip
        self.values = {"r": config.r}

    def file_key(self, part: str, leaf: str) -> str | None:
        if part not in self.constant:
            return super().file_key(part, leaf)
        return f"/{part}" if self.config.save_projection else None

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        a, b, d, scale = self._tensors(shape[0])
        r: int = self["r"]
        return d[:r, None] * a[:r, : size(shape)[1]], scale[:, None] * b

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if base.groups > 1:
            return super().forward(x, base)
        a, b, d, scale = self._tensors(base.shape[0])
        r = d.numel() if self.draws() else self["r"]
        y, kept = base(x), base.drop(x, self.rate(self.dropout))
        kind = a.dtype if base.indexed else product_dtype(compute_dtype(x), x.device)
        axis = y.dim() + 1 - len(base.shape)
        if base.indexed or len(base.shape) > 2:
            corner = a[:r, : size(base.shape)[1]].to(kind).view(-1, *base.shape[1:])
            h = base.apply(kept if base.indexed else kept.to(kind), corner).movedim(axis, -1)
        else:
            h = projected(kept, a, r, kind)
        noise = self.noise(h) if self.draws() else None
        more: Tensor = ScaledFunction.apply(h, d[:r], scale, b, noise)  # type: ignore[no-untyped-call]
        return y + more.movedim(-1, axis).to(y.dtype)

    def draws(self) -> bool:
        """Whether z is drawn at random."""
        return False

    def noise(self, h: Tensor) -> Tensor:
        """(.., r), for h (.., 2 r)."""
        raise NotImplementedError

    def _tensors(self, out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B for ``out`` rows, d and b."""
        d, scale = self[self.prefix + "d"], self[self.prefix + "b"]
        a, b = (near(self[part], d) for part in self.constant)
        return a, b[:out], d, scale
