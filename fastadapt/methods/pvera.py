# SPDX-License-Identifier: Apache-2.0
"""PVeRA:  y = W x + diag(b) B z,  z ~ N(mu, exp(v)),  (mu, v) = diag(d) A x.

    A: (2 r, in * kernel)  B: (out, r)  d: (2 r,), starts at d_initial  b: (out,), starts at 0

z is drawn in training; else z = mu, so W' = W + diag(b) B diag(d) A with the first r of d and A.
A and B are random, frozen and the same for all layers, see ``vera``.
Source: PVeRA (arXiv 2512.07703).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import UnsupportedError
from fastadapt.methods import fields
from fastadapt.methods.pair import PairAdapter, drop_part
from fastadapt.methods.projection import generator, largest, near, size, uniform
from fastadapt.ops.precision import compute_dtype, product_dtype
from fastadapt.targets import DEFAULT_TARGETS


@dataclass
class PveraConfig(AdapterConfig):
    """PEFT's PveraConfig: VeraConfig's fields with pvera_dropout, and

    sample_at_inference: draw z in evaluation, too; generator_seed: each layer draws from its own
    generator with this seed (not replayed by gradient checkpointing), None: from torch's.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    without = ("exclude_modules",)
    default_targets = {  # noqa: RUF012
        **DEFAULT_TARGETS,
        "phi": ["q_proj", "v_proj"],
        "dinov2": ["query", "value"],
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PVERA  # type: ignore[attr-defined]
        fields.count(self, "r")
        fields.rate(self, "pvera_dropout")
        fields.choice(self, "bias", ("none", "all", "pvera_only"))
        fields.projections_kept(self, "pvera_A and pvera_B", "projection_prng_key")


class Pvera(PairAdapter):
    name, prefix, Config = "pvera", "pvera_lambda_", PveraConfig
    must_agree: ClassVar = {
        "projection_prng_key": "PVeRA PRNG initialisation key must be the same for all adapters",
        "save_projection": "PVeRA projection weights must be saved for all adapters or none",
    }
    constant = ("pvera_A", "pvera_B")
    dropout = "pvera_dropout"

    @classmethod
    def shared(cls, config: PveraConfig, bases: dict[str, Base]) -> dict[str, nn.Parameter]:
        out, width = largest(bases.values())
        source = generator(config.projection_prng_key)
        a = uniform(2 * config.r, width, source)
        return {"pvera_A": a, "pvera_B": uniform(out, config.r, source)}

    def build(self, base: Base, shared: Any) -> None:
        config: PveraConfig = self.config
        if base.groups > 1:
            raise UnsupportedError(
                "PVeRA is not supported for a grouped convolution: z is drawn from all input "
                "channels, of which a group sees its own"
            )
        self.identity_at_init = config.init_weights  # type: ignore[misc]
        b, d = torch.ones(base.shape[0]), torch.randn(2 * config.r)
        if config.init_weights:
            b.zero_()
            d.fill_(config.d_initial)
        seed = config.generator_seed
        self.parts = {
            "pvera_dropout": drop_part(config.pvera_dropout), "pvera_lambda_b": nn.Parameter(b),
            "pvera_lambda_d": nn.Parameter(d), **shared,
        }  # fmt: skip
        self.values = {
            "r": config.r, "sample_at_inference": config.sample_at_inference,
            "pvera_generator": None if seed is None else generator(seed),
        }  # fmt: skip

    def file_key(self, part: str, leaf: str) -> str | None:
        if part not in self.constant:
            return super().file_key(part, leaf)
        return f"/{part}" if self.config.save_projection else None

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        a, b, d, r = *self._corner(shape), self["pvera_lambda_d"], self["r"]
        return d[:r, None] * a[:r], self["pvera_lambda_b"][:, None] * b

    def forward(self, x: Tensor, base: Base) -> Tensor:
        (a, b), r = self._corner(base.shape), self["r"]
        y, kept = base(x), base.drop(x, self.rate("pvera_dropout"))
        kind = a.dtype if base.indexed else product_dtype(compute_dtype(x), x.device)
        kept = kept if base.indexed else kept.to(kind)
        a, d = a.to(kind).view(-1, *base.shape[1:]), self["pvera_lambda_d"].to(kind)
        z = base.apply(kept, a[:r]) * base.channels(d[:r])
        if self["sample_at_inference"] or self["pvera_dropout"].training:
            std = torch.exp(0.5 * (base.apply(kept, a[r:]) * base.channels(d[r:])))
            z = z + std * self._noise(std)
        return y + base.mix(z, (self["pvera_lambda_b"][:, None] * b).to(kind)).to(y.dtype)

    def _noise(self, std: Tensor) -> Tensor:
        source = self["pvera_generator"]
        if source is None:
            return torch.randn_like(std)
        return torch.randn(std.shape, dtype=std.dtype, generator=source).to(std.device)

    def _corner(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        out, width = size(shape)
        own = self["pvera_lambda_d"]
        return near(self["pvera_A"], own)[:, :width], near(self["pvera_B"], own)[:out]
