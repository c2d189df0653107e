# SPDX-License-Identifier: Apache-2.0
"""Uni-LoRA:  W' = W + B A,  every number of every A and B one of d shared numbers, scaled.

    theta: (d,), one for all layers  A[i, j] = theta[p] / sqrt(uses of theta[p]),  p drawn once
    A: (r, in * kernel)  B: (out, r)

Source: Uni-LoRA (arXiv 2506.00799).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.pair import PairAdapter, drop_part
from fastadapt.methods.projection import near, size


@dataclass
class UniLoraConfig(AdapterConfig):
    """PEFT's UniLoraConfig.

    r: the rank; theta_d_length: d; proj_seed: of the draw of p; save_indices: files hold p and
    the scales, too; unilora_dropout: on the input; bias: "none", "all" or "unilora_only";
    init_theta_d_bound: theta starts uniform within it; init_weights: False starts it at N(0, 1).
    ``fan_in_fan_out`` has no effect: layers know how they store W.
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    without = ("exclude_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.UNILORA  # type: ignore[attr-defined]
        fields.count(self, "r", "theta_d_length")
        fields.rate(self, "unilora_dropout")
        fields.choice(self, "bias", ("none", "all", "unilora_only"))
        if not self.init_theta_d_bound > 0:
            raise ConfigError(
                f"`init_theta_d_bound` should be a positive float, got {self.init_theta_d_bound!r}"
            )


class UniLora(PairAdapter):
    converts = True
    name, prefix, Config = "unilora", "unilora_", UniLoraConfig
    identity_at_init = False
    constant = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
    dropout = "unilora_dropout"

    @classmethod
    def shared(cls, config: UniLoraConfig, bases: dict[str, Base]) -> dict[Any, Any]:
        """theta, and under each base's id its (indices, scales) of A and B."""
        theta, bound = torch.empty(config.theta_d_length), config.init_theta_d_bound
        if config.init_weights:
            theta.uniform_(-bound, bound)
        else:
            theta.normal_()
        shapes = [s for b in bases.values() for s in _shapes(b, config.r)]
        places = _places(sum(n * k for n, k in shapes), config.theta_d_length, config.proj_seed)
        uses = torch.bincount(places, minlength=config.theta_d_length)
        scales = torch.where(uses > 0, uses.float().rsqrt(), 0.0)
        pieces = iter(places.split([n * k for n, k in shapes]))
        drawn = {
            id(b): [next(pieces).view(s) for s in _shapes(b, config.r)] for b in bases.values()
        }
        return {"theta": nn.Parameter(theta), "scales": scales, **drawn}

    def build(self, base: Base, shared: dict[Any, Any]) -> None:
        config: UniLoraConfig = self.config
        self.parts = {
            "unilora_dropout": drop_part(config.unilora_dropout),
            "unilora_theta_d": shared["theta"],
        }
        for letter, places in zip("AB", shared[id(base)], strict=True):
            self.parts[f"unilora_indices_{letter}"] = nn.Parameter(places, requires_grad=False)
            self.parts[f"unilora_scales_{letter}"] = nn.Parameter(
                shared["scales"][places], requires_grad=False
            )
        self.values = {"r": config.r}

    def file_key(self, part: str, leaf: str) -> str | None:
        if part == "unilora_theta_d":
            return f"/{part}"
        return super().file_key(part, leaf) if self.config.save_indices else None

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self._drawn("A"), self._drawn("B")

    def _drawn(self, letter: str) -> Tensor:
        places: Tensor = self[f"unilora_indices_{letter}"]
        theta = near(self["unilora_theta_d"], places)
        made = theta.index_select(0, places.flatten()).view(places.shape)
        scales: Tensor = self[f"unilora_scales_{letter}"]
        return made * scales.to(made.dtype)


def _shapes(base: Base, r: int) -> list[tuple[int, int]]:
    """Of A and B."""
    out, inner = size(base.shape)
    return [(r, inner), (out, r)]


@lru_cache(maxsize=4)
def _places(count: int, d: int, seed: int) -> Tensor:
    """(count,) numbers below d, each as often as any other or once more; int64 on the CPU. numpy's
    generator, because it is PEFT's."""
    import numpy as np

    source = np.random.default_rng(seed)
    values = np.repeat(np.arange(d), count // d)
    if count % d:
        values = np.concatenate([values, source.choice(d, size=count % d, replace=False)])
    source.shuffle(values)
    return torch.as_tensor(values, dtype=torch.long, device="cpu")
