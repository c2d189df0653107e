# SPDX-License-Identifier: Apache-2.0
"""SHiRA:  W' = W + s S,  S sparse: r (out + in) entries at places that are drawn once.

    shira_weight: (r (out + in),)  shira_indices: (2, r (out + in)) int32, rows and columns

On convolutions ``in`` is the whole patch. The gradient of S needs dW' at scattered places, so a
step has a third full product for each layer (LoRA: two and the low-rank ones); that is the floor.
Source: SHiRA (arXiv 2406.13175).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, FastAdaptWarning, UnsupportedError
from fastadapt.methods import fields
from fastadapt.methods.dense import DenseDelta
from fastadapt.targets import DEFAULT_TARGETS


@dataclass
class ShiraConfig(AdapterConfig):
    """PEFT's ShiraConfig.

    r: as many parameters as a LoRA of this rank; mask_type: "random", or any other name with
    ``config.mask_fn = f``, f(layer, r) -> a mask of 0 and 1 in the shape of ``layer.weight``
    (out, in); random_seed: of the random mask.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    without = ("exclude_modules", "layers_to_transform", "layers_pattern")
    default_targets = {**DEFAULT_TARGETS, "phi": ["q_proj", "v_proj"]}  # noqa: RUF012
    mask_fn = None
    """Set on a config object; never saved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SHIRA  # type: ignore[attr-defined]
        fields.count(self, "r")
        if self.mask_type != "random" and not self.inference_mode:
            warnings.warn(
                f"Argument self.mask_type={self.mask_type!r} is not recognized, please supply your "
                "own masking function by calling `config.mask_fn = my_mask_fn`.",
                FastAdaptWarning, stacklevel=4,
            )  # fmt: skip


class Shira(DenseDelta):
    # sparse: a pair of a small rank is far from it
    converts = False
    name, prefix, Config = "shira", "shira_", ShiraConfig
    constant = ("shira_indices",)

    def build(self, base: Base, shared: Any) -> None:
        config: ShiraConfig = self.config
        n, k = base.shape[0], math.prod(base.shape[1:])
        count = config.r * (n + k)
        if count > n * k:
            raise UnsupportedError(
                f"The set rank {config.r} results in more shira params than the total number of "
                f"params in the base layer {n * k} and this is not allowed."
            )
        values = torch.zeros(count) if config.init_weights else torch.randn(count)
        places = _places(config, base, count).to(torch.int32)
        self.parts = {"shira_weight": nn.Parameter(values),
                      "shira_indices": nn.Parameter(places, requires_grad=False)}  # fmt: skip
        self.values = {"r": config.r, "scaling": 1.0}
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        rows, cols = self["shira_indices"].long()
        values: Tensor = self["shira_weight"] * self["scaling"]
        inner = math.prod(shape[1:])
        made = values.new_zeros(shape[0] * inner).scatter_add(0, rows * inner + cols, values)
        return made.view(shape)


def _places(config: ShiraConfig, base: Base, count: int) -> Tensor:
    """(rows, columns) in the order of the stored matrix."""
    n, k = base.shape[0], math.prod(base.shape[1:])
    if config.mask_type == "random":
        generator = torch.Generator()
        if config.random_seed is not None:
            generator.manual_seed(config.random_seed)
        flat = torch.randperm(n * k, generator=generator, device="cpu")[:count].sort().values
    else:
        mask_fn: Callable[..., Tensor] | None = config.mask_fn
        if mask_fn is None:
            # the places will come from a file
            return torch.zeros(2, count)
        layer = SimpleNamespace(weight=base.read()[0], in_features=k, out_features=n)
        flat = mask_fn(layer, config.r).reshape(-1).nonzero().flatten().cpu()
        if flat.numel() != count:
            raise ConfigError(f"mask_fn: expected a mask with {count} ones, got {flat.numel()}")
    return torch.stack([flat // k, flat % k])
