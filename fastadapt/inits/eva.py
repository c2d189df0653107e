# SPDX-License-Identifier: Apache-2.0
"""EVA: a = the leading right singular vectors of the layer's inputs on real data, b = 0, and ranks
go to the layers whose inputs have more variance to explain.

Until the data has been seen the start is nn.Linear's own a. Source: EVA (arXiv 2410.07170).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.errors import ConfigError
from fastadapt.inits.init import Init


@dataclass
class EvaConfig:
    """rho: a layer has at most rho r ranks; tau: cosine similarity at which a layer has converged;
    use_label_mask, label_mask_value: which tokens count; whiten: divide by the root of the singular
    values; adjust_scaling_factors: keep alpha / r of each layer."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ConfigError("`rho` must be >= 1.0")
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError("`tau` must be between 0.0 and 1.0.")


class Eva(Init):
    def fill(self, a: Tensor, b: Tensor, base: Base, config: Any) -> None:
        nn.init.zeros_(b)
