# SPDX-License-Identifier: Apache-2.0
"""Super-Tuning:  W' = W + S + s B A,  S sparse, at the entries of W of largest magnitude.

    supertuning_values, supertuning_indices: (share of the entries,), flat places in W (out, in)
    A: (r, in * kernel)  B: (out, r)  s = lora_alpha / r,  only with r ("Supra")

As in SHiRA the gradient of S needs dW' at scattered places: a third full product a step, the floor.
Source: Super-Tuning (arXiv 2607.09287).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, FastAdaptWarning, UnsupportedError
from fastadapt.methods import fields
from fastadapt.methods.dense import DenseDelta
from fastadapt.methods.pair import drop_part
from fastadapt.methods.projection import size
from fastadapt.ops.low_rank import low_rank
from fastadapt.ops.precision import compute_dtype


@dataclass
class SupertuningConfig(AdapterConfig):
    """PEFT's SupertuningConfig.

    sparsity: share of the entries that stays as it is; select_top: train the largest, not the
    smallest; r, lora_alpha, lora_dropout: of the pair beside S, None for none;
    save_precomputed_indices: files hold the places.
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    without = ("exclude_modules", "layers_to_transform", "layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SUPERTUNING  # type: ignore[attr-defined]
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity must be in [0.0, 1.0), got {self.sparsity}")
        if self.r is not None:
            if not 0 < self.r <= fields.MAX_COUNT:
                raise ConfigError(f"r must be a positive integer or None, got {self.r!r}")
            self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
        elif self.lora_alpha is not None:
            raise ConfigError(
                "lora_alpha is set but r is None — Supra mode requires an explicit r."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0.0, 1.0), got {self.lora_dropout}")
        if not self.save_precomputed_indices:
            warnings.warn(
                "save_precomputed_indices=False: sparse-support indices will be recomputed from "
                "base weight magnitudes at load time; the base must be the same to the bit",
                FastAdaptWarning, stacklevel=4,
            )  # fmt: skip


class Supertuning(DenseDelta):
    # sparse: a pair of a small rank is far from it
    converts = False
    name, prefix, Config = "supertuning", "supertuning_", SupertuningConfig
    must_agree: ClassVar = {
        "save_precomputed_indices": "Super-Tuning indices must be saved for all adapters or none",
    }
    constant = ("supertuning_indices",)

    def build(self, base: Base, shared: Any) -> None:
        config: SupertuningConfig = self.config
        n, k = size(base.shape)
        count = int(n * k * (1 - config.sparsity))
        if count < 1:
            raise UnsupportedError(
                f"sparsity={config.sparsity} leaves no trainable entries for a weight with {n * k} "
                "elements; lower it so that at least one is trained"
            )
        start = config.init_weights
        values = torch.zeros(count) if start else torch.randn(count)
        places = torch.zeros(count, dtype=torch.int32)
        self.parts = {"supertuning_values": nn.Parameter(values),
                      "supertuning_indices": nn.Parameter(places, requires_grad=False)}  # fmt: skip
        if config.r is not None:
            a, b = nn.Linear(k, config.r, bias=False), nn.Linear(config.r, n, bias=False)
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            if start:
                nn.init.zeros_(b.weight)
            else:
                nn.init.kaiming_uniform_(b.weight, a=math.sqrt(5))
            self.parts |= {"supertuning_lora_A": a, "supertuning_lora_B": b,
                           "supertuning_lora_dropout": drop_part(config.lora_dropout)}  # fmt: skip
        self.values = {"supertuning_rank": config.r or 0,
                       "supertuning_lora_alpha": float(config.lora_alpha or 0)}  # fmt: skip
        self.identity_at_init = start  # type: ignore[misc]

    def start(self, base: Base) -> None:
        places = self["supertuning_indices"]
        if not places.is_meta:
            scores = base.read()[0].detach().abs().flatten()
            with torch.no_grad():
                top = self.config.select_top
                places.copy_(scores.topk(places.numel(), largest=top).indices)

    def file_key(self, part: str, leaf: str) -> str | None:
        if part in self.constant and not self.config.save_precomputed_indices:
            return None
        return super().file_key(part, leaf)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """S."""
        places, values = self["supertuning_indices"].long(), self["supertuning_values"]
        flat: Tensor = values.new_zeros(math.prod(shape)).scatter_add(0, places, values)
        return flat.view(shape)

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w, bias = super().merged(w, bias)
        pair = self._pair()
        return w if pair is None else w + (pair[1] @ pair[0]).view(w.shape), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, pair = super().forward(x, base), self._pair()
        if pair is None:
            return y
        p = self.rate("supertuning_lora_dropout")
        if base.indexed or len(base.shape) > 2:
            x, delta = base.drop(x, p), (pair[1] @ pair[0]).view(base.shape)
            return y + base.apply(x if base.indexed else x.to(y.dtype), delta.to(y.dtype))
        kind = compute_dtype(x)
        return y + low_rank(x, *pair, 1.0, p=p, compute=kind, out=kind).to(y.dtype)

    def _pair(self) -> tuple[Tensor, Tensor] | None:
        """(A, s B)."""
        r = self["supertuning_rank"]
        if not r:
            return None
        a, b = self["supertuning_lora_A"].weight, self["supertuning_lora_B"].weight
        return a, b * (self["supertuning_lora_alpha"] / r)
