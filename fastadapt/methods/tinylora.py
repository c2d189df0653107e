# SPDX-License-Identifier: Apache-2.0
"""TinyLoRA:  W' = W + B (sum_i v_i P_i) A,  A and B from W's largest singular values, frozen.

    W = U S V: A = S^1/2 V (r, in * kernel)  B = U S^1/2 (out, r)  P: (u, r, r), random, frozen
    v: (u,), starts at 0; groups of layers share one

An embedding's A and B are those of its stored table, (r, dim) and (vocabulary, r).
Source: TinyLoRA (arXiv 2602.04118).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.pair import PairAdapter, drop_part
from fastadapt.methods.projection import generator, near, size


@dataclass
class TinyLoraConfig(AdapterConfig):
    """PEFT's TinyLoraConfig.

    r: singular values used; u: numbers in v; weight_tying: 0 gives each layer its own v, 1 one to
    all; projection_seed: of P, plus the layer's number; save_projection: files hold P;
    init_v_bound: of a "uniform" start; tinylora_dropout: on the input; bias: "none", "all" or
    "tinylora_only"; init_weights: True starts at the identity, "uniform" (or False) does not.
    ``fan_in_fan_out`` has no effect: layers know how they store W.
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool | str = True

    without = ("exclude_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TINYLORA  # type: ignore[attr-defined]
        fields.count(self, "r", "u")
        fields.rate(self, "tinylora_dropout")
        fields.choice(self, "bias", ("none", "all", "tinylora_only"))
        fields.choice(self, "init_weights", (True, False, "uniform"))
        fields.projections_kept(self, "the tensors P", "projection_seed")
        if not 0 <= self.weight_tying <= 1:
            raise ConfigError(
                "`weight_tying` should be a float between 0.0 and 1.0 but the value passed is "
                f"{self.weight_tying}"
            )


class TinyLora(PairAdapter):
    converts = True
    name, prefix, Config = "tinylora", "tinylora_", TinyLoraConfig
    must_agree: ClassVar = {
        "save_projection": "TinyLoRA projection tensors must be saved for all adapters or none",
    }
    constant = ("tinylora_A", "tinylora_B", "tinylora_P")
    dropout = "tinylora_dropout"

    @classmethod
    def shared(cls, config: TinyLoraConfig, bases: dict[str, Base]) -> dict[Any, Any]:
        """Every v by its group's number, and under each base's id its own number."""
        groups = max(1, round(len(bases) * (1 - config.weight_tying)))
        vectors = nn.ParameterDict()
        for group in range(groups):
            v = torch.zeros(config.u)
            if config.init_weights is not True:
                v.uniform_(-config.init_v_bound, config.init_v_bound)
            vectors[str(group)] = nn.Parameter(v)
        return {"v": vectors, **{id(b): i for i, b in enumerate(bases.values())}}

    def build(self, base: Base, shared: dict[Any, Any]) -> None:
        config: TinyLoraConfig = self.config
        number, groups = shared[id(base)], len(shared["v"])
        out, inner = size(base.shape)
        if base.indexed:
            out, inner = inner, out
        r = min(config.r, out, inner)
        p = torch.empty(config.u, r, r)
        if not p.is_meta:
            p.normal_(0, 1 / r**0.5, generator=generator(config.projection_seed + number))
        self.identity_at_init = config.init_weights is True  # type: ignore[misc]
        constants = {"tinylora_A": torch.zeros(r, inner), "tinylora_B": torch.zeros(out, r),
                     "tinylora_P": p}  # fmt: skip
        self.parts = {
            "tinylora_dropout": drop_part(config.tinylora_dropout), "tinylora_v": shared["v"],
            **{k: nn.Parameter(t, requires_grad=False) for k, t in constants.items()},
        }  # fmt: skip
        count = (len(shared) - 1) // groups
        self.values = {"r": r, "u": config.u,
                       "_tinylora_v_key": str(min(number // max(1, count), groups - 1)),
                       "_indexed": base.indexed}  # fmt: skip

    def start(self, base: Base) -> None:
        w, r = base.read()[0].flatten(1), self["r"]
        w = w.t() if base.indexed else w
        with torch.no_grad():
            u, s, v = torch.linalg.svd(w.float(), full_matrices=False)
            root = s[:r].sqrt()
            self["tinylora_A"].copy_(root[:, None] * v[:r])
            self["tinylora_B"].copy_(u[:, :r] * root)

    def file_key(self, part: str, leaf: str) -> str | None:
        if part == "tinylora_v":
            return f"/{part}.{leaf}"
        if part == "tinylora_P" and not self.config.save_projection:
            return None
        return super().file_key(part, leaf)

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        a, b, p = self["tinylora_A"], self["tinylora_B"], self["tinylora_P"]
        v = near(self["tinylora_v"][self["_tinylora_v_key"]], p)
        middle = (v @ p.flatten(1)).view(p.shape[1:])
        if self["_indexed"]:
            return b.t(), (middle @ a).t()
        return a, b @ middle
