# SPDX-License-Identifier: Apache-2.0
"""C3A:  W' = W + C(w) / in,  C made of circulant blocks:  y_i = sum_j  w_ij correlated with x_j.

    w: (out / b, in / b, b)  x in blocks of b: (tokens, in / b, b)

Blocks are laid out as windows over w, and meet x in the product with W. (By spectra, x's and w's,
the update costs 1 / b of that product and three transforms of the activations, which is more for
any b: 1.17 x LoRA's step against 1.06 at 8 x 576 with b = 64.)
Source: C3A (arXiv 2407.19342).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import UnsupportedError
from fastadapt.methods import fields
from fastadapt.methods.dense import DenseDelta
from fastadapt.methods.fourierft import MLP_OUT
from fastadapt.methods.projection import size
from fastadapt.targets import DEFAULT_TARGETS, pattern_value

_STARTS = ("gaussian", "kaiming_uniform", "xavier_uniform", True, False)


@dataclass
class C3AConfig(AdapterConfig):
    """PEFT's C3AConfig.

    block_size: b, which divides both sizes of each layer; block_size_pattern: pattern -> b;
    bias: "none", "all" or "c3a_only"; init_weights: True starts at the identity; "gaussian",
    "kaiming_uniform", "xavier_uniform" (False is this one, too) do not.
    """

    block_size: int = 256
    bias: str = "none"
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | str | None = "xavier_uniform"

    without = ("exclude_modules",)
    default_targets = {**DEFAULT_TARGETS, **MLP_OUT}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.C3A  # type: ignore[attr-defined]
        self.block_size_pattern = dict(self.block_size_pattern or {})
        fields.count(self, "block_size")
        fields.choice(self, "bias", ("none", "all", "c3a_only"))
        fields.choice(self, "init_weights", _STARTS)

    def at(self, path: str) -> C3AConfig:
        if not self.block_size_pattern:
            return self
        b = pattern_value(self.block_size_pattern, path, self.block_size)
        return dataclasses.replace(self, block_size=b)


class C3A(DenseDelta):
    name, prefix, Config = "c3a", "c3a_", C3AConfig

    def build(self, base: Base, shared: Any) -> None:
        config: C3AConfig = self.config
        (out, inner), b = size(base.shape), config.block_size
        for what, n in (("input", inner), ("output", out)):
            if n % b:
                raise UnsupportedError(
                    f"The block size should be a factor of the {what} size. However, the {what} "
                    f"size is {n} and the block size is {b}; block_size_pattern can give this "
                    "layer its own"
                )
        kernel = nn.Parameter(torch.zeros(out // b, inner // b, b))
        self.identity_at_init = config.init_weights is True  # type: ignore[misc]
        bound = math.sqrt(6 / (out + inner))
        if config.init_weights == "gaussian":
            nn.init.normal_(kernel)
        elif config.init_weights == "kaiming_uniform":
            nn.init.uniform_(kernel, -math.sqrt(1 / inner), math.sqrt(1 / inner))
        elif config.init_weights is not True:
            nn.init.uniform_(kernel, -bound, bound)
        self.parts = {"c3a_kernel": kernel}
        self.values = {"block_size": b}

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        blocks: Tensor = CirculantFunction.apply(self["c3a_kernel"])  # type: ignore[no-untyped-call]
        return blocks.transpose(1, 2).reshape(shape) / size(shape)[1]


class CirculantFunction(torch.autograd.Function):
    """w: (m, n, b) -> (m, n, b, b), [.., i, j] = w[.., (j - i) mod b]."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        windows = torch.cat([w, w], -1).unfold(-1, w.shape[-1], 1)
        return windows[..., 1:, :].flip(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        # row i moved left by i: one step further for each row of the doubled rows
        rows = torch.cat([g, g], -1).contiguous()
        *outer, step, one = rows.stride()
        return rows.as_strided(g.shape, (*outer, step + 1, one)).sum(-2)
