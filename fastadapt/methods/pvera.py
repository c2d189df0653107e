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
from torch import Tensor

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import UnsupportedError
from fastadapt.methods import fields
from fastadapt.methods.projection import generator
from fastadapt.methods.vera import Vera
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


class Pvera(Vera):
    name, prefix, Config = "pvera", "pvera_lambda_", PveraConfig
    must_agree: ClassVar = {
        "projection_prng_key": "PVeRA PRNG initialisation key must be the same for all adapters",
        "save_projection": "PVeRA projection weights must be saved for all adapters or none",
    }
    constant = ("pvera_A", "pvera_B")
    dropout = "pvera_dropout"
    times = 2

    def build(self, base: Base, shared: Any) -> None:
        if base.groups > 1:
            raise UnsupportedError(
                "PVeRA is not supported for a grouped convolution: z is drawn from all input "
                "channels, of which a group sees its own"
            )
        super().build(base, shared)
        seed = self.config.generator_seed
        self.values |= {
            "sample_at_inference": self.config.sample_at_inference,
            "pvera_generator": None if seed is None else generator(seed),
        }

    def draws(self) -> bool:
        return bool(self["sample_at_inference"] or self["pvera_dropout"].training)

    def noise(self, h: Tensor) -> Tensor:
        source = self["pvera_generator"]
        shape = (*h.shape[:-1], h.shape[-1] // 2)
        if source is None:
            return torch.randn(shape, dtype=h.dtype, device=h.device)
        return torch.randn(shape, dtype=h.dtype, generator=source).to(h.device)
