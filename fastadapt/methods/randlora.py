# SPDX-License-Identifier: Apache-2.0
"""RandLoRA:  W' = W + s B A',  A'[i, j] = lambda[i, j] gamma[j] A[i],  s = alpha / r,  full rank.

    A: (r, 1, short)  B: (long, n, r)  random, frozen, the same for all layers
    lambda: (r, n), starts at 0  gamma: (n, short)  short, long: the smaller and larger of out and
    in * kernel, n = ceil(short / r);  W is (long, short) here, or its transpose

As in PEFT the r n rows of A' are counted with j running first, the columns of B with i first.
The update has full rank: with D = short = long its two products cost what the base's do, T D^2
each, whatever the order. Beside the base's two a step takes 5 T D^2 through the activations, and
T D^2 + 3 D^3 through delta W, which is made twice: the second when T > 3 D / 4.
Source: RandLoRA (arXiv 2502.00987).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.methods import fields
from fastadapt.methods.dense import DenseDelta
from fastadapt.methods.pair import drop_part
from fastadapt.methods.projection import generator, largest, near, size


@dataclass
class RandLoraConfig(AdapterConfig):
    """PEFT's RandLoraConfig.

    r: rank of one of the n terms; randlora_alpha: s = randlora_alpha / r; projection_prng_key:
    seed of A and B; save_projection: files hold them; sparse, very_sparse: entries -1, 0, 1, the
    others 1 - 1/3 or 1 - 1/sqrt(short) of the time 0; randlora_dropout: on the input; bias:
    "none", "all" or "randlora_only"; init_weights: False starts lambda at N(0, 1).
    ``fan_in_fan_out`` has no effect: layers know how they store W.
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    init_weights: bool = True

    without = ("exclude_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.RANDLORA  # type: ignore[attr-defined]
        fields.count(self, "r")
        fields.rate(self, "randlora_dropout")
        fields.choice(self, "bias", ("none", "all", "randlora_only"))
        fields.projections_kept(self, "randlora_A and randlora_B", "projection_prng_key")

    @property
    def scaling(self) -> float:
        """s."""
        return self.randlora_alpha / self.r


class RandLora(DenseDelta):
    name, prefix, Config = "randlora", "randlora_", RandLoraConfig
    must_agree: ClassVar = {
        "projection_prng_key": "RandLora PRNG initialisation key must be the same for all adapters",
        "save_projection": "RandLora projection weights must be saved for all adapters or none",
    }
    constant = ("randlora_A", "randlora_B")
    dropout = "randlora_dropout"

    @classmethod
    def shared(cls, config: RandLoraConfig, bases: dict[str, Base]) -> dict[str, nn.Parameter]:
        short, long = sorted(largest(bases.values()))
        shape_a, shape_b = (config.r, 1, short), (long, -(-short // config.r), config.r)
        source = generator(config.projection_prng_key)
        if torch.empty(0).is_meta:
            a, b = torch.empty(shape_a), torch.empty(shape_b)
        elif config.sparse or config.very_sparse:
            few = math.sqrt(short) if config.very_sparse else 3.0
            a, b = _signs(shape_a, few, source), _signs(shape_b, few, source)
        else:
            a = _kaiming(shape_a, source)
            terms = [_kaiming((long, 1, config.r), source) for _ in range(shape_b[1])]
            b = torch.cat(terms, 1)
            a, b = a / a.std(), b / b.std()
        return {"randlora_A": nn.Parameter(a, False), "randlora_B": nn.Parameter(b, False)}

    def build(self, base: Base, shared: Any) -> None:
        config: RandLoraConfig = self.config
        short, long = sorted(size(base.shape))
        n = -(-short // config.r)
        factors, gamma = torch.randn(config.r, n), torch.full((n, short), 1 / long)
        if config.init_weights:
            factors.zero_()
            gamma.fill_(1 / max(n, short))
        self.identity_at_init = config.init_weights  # type: ignore[misc]
        self.parts = {
            "randlora_dropout": drop_part(config.randlora_dropout),
            "randlora_lambda": nn.Parameter(factors), "randlora_gamma": nn.Parameter(gamma),
            **shared,
        }  # fmt: skip
        self.values = {"r": config.r, "scaling": config.scaling}

    def file_key(self, part: str, leaf: str) -> str | None:
        if part not in self.constant:
            return super().file_key(part, leaf)
        return f"/{part}" if self.config.save_projection else None

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(a, b) with delta W = s b a."""
        factors, gamma = self["randlora_lambda"], self["randlora_gamma"]
        (out, inner), (n, short) = size(shape), gamma.shape
        a, b = near(self["randlora_A"], gamma), near(self["randlora_B"], gamma)
        scaled = TermsFunction.apply(a[:, 0, :short], factors, gamma)  # type: ignore[no-untyped-call]
        b = b[: max(out, inner), :n].flatten(1)
        return (scaled, b) if short == inner else (b.t(), scaled.t())

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        a, b = self.pair(shape)
        scale: float = self["scaling"]
        return (b @ a).view(shape) * scale

    def forward(self, x: Tensor, base: Base) -> Tensor:
        out, inner = size(base.shape)
        if base.groups > 1 or base.indexed or 4 * x.numel() // inner > 3 * max(out, inner):
            return super().forward(x, base)
        (a, b), p = self.pair(base.shape), self.rate(self.dropout)
        return base.low_rank(x, a.view(-1, *base.shape[1:]), b, self["scaling"], p)


class TermsFunction(torch.autograd.Function):
    """a: (r, k)  factors: (r, n)  gamma: (n, k) -> factors[i, j] gamma[j] a[i]: (r n, k), without
    keeping the products in between."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, factors: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(a, factors, gamma)
        return (factors[:, :, None] * a.to(gamma.dtype)[:, None] * gamma).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor]:
        a, factors, gamma = ctx.saved_tensors
        products = g.view(*factors.shape, -1) * a.to(g.dtype)[:, None]
        dfactors = torch.einsum("ijk,jk->ij", products, gamma)
        return None, dfactors, torch.einsum("ijk,ij->jk", products, factors)


def _kaiming(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    # PEFT draws in bf16
    made = torch.empty(shape, dtype=torch.bfloat16)
    return nn.init.kaiming_uniform_(made, a=math.sqrt(5), generator=source)


def _signs(shape: tuple[int, ...], few: float, source: torch.Generator) -> Tensor:
    """-1 and 1 with probability 1 / (2 few) each, else 0, over their deviation."""
    drawn, edge = torch.rand(shape, generator=source), 1 / (2 * few)
    signs = (drawn > 1 - edge).float() - (drawn < edge).float()
    return signs / signs.std()
