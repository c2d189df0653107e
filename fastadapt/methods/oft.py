# SPDX-License-Identifier: Apache-2.0
"""OFT:  W' = W diag(R_1 .. R_g)^T,  R = (I - Q) (I + Q)^-1 or its Neumann series, Q skew-symmetric.

    weight: (g, s (s - 1) / 2), the upper triangle of each Q;  g s = in (times the kernel)

The blocks turn the input: y = W (x R). On a convolution they turn the patch, as its merged weight
says (PEFT folds overlapping patches back into an image, and is no identity at its start). An
embedding is turned at its output: W' = diag(R)^T W. COFT keeps ||Q|| <= eps / sqrt(g) by
projecting the parameter before each use. ``module_dropout`` sets blocks to the identity in
training (PEFT accepts it and ignores it).
Sources: OFT (arXiv 2306.07280), OFTv2 (arXiv 2506.19847).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, FastAdaptWarning
from fastadapt.methods import fields
from fastadapt.ops.rotate import cayley, rotate


@dataclass
class OFTConfig(AdapterConfig):
    """PEFT's OFTConfig.

    r: the number of blocks, or oft_block_size: their size; one of them is 0, and one that does not
    divide the layer is moved to the nearest that does; module_dropout: share of the blocks that is
    the identity, in [0, 1); coft, eps: the constraint; block_share: one block, repeated;
    use_cayley_neumann, num_cayley_neumann_terms: a series instead of the inverse.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    @classmethod
    def of_earlier(cls, values: dict[str, Any]) -> dict[str, Any]:
        """PEFT 0.17 summed another series, 2 Q^(terms-1) at its end; it wrote no ``peft_version``,
        and PEFT since 0.18 reads its files as if they were of the series of today."""
        if values.get("use_cayley_neumann") and values.get("peft_version") is None:
            warnings.warn(
                "this OFT adapter was trained with the Neumann series of PEFT <= 0.17, whose last "
                "term is twice that of later releases: outputs differ from those it was trained "
                "to give: train it a little further",
                FastAdaptWarning,
                stacklevel=4,
            )
        return values

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.OFT  # type: ignore[attr-defined]
        if self.r < 0 or self.oft_block_size < 0 or not (self.r or self.oft_block_size):
            raise ConfigError(
                "Either `r` or `oft_block_size` must be non-zero (and positive). Currently, "
                f"r = {self.r} and oft_block_size = {self.oft_block_size}."
            )
        if self.r and self.oft_block_size:
            raise ConfigError(
                f"You can only specify either r ({self.r}) or oft_block_size "
                f"({self.oft_block_size}), but not both simultaneously, because r x oft_block_size "
                "== in_features. Set oft_block_size=0 to give r."
            )
        fields.rate(self, "module_dropout")
        fields.choice(self, "bias", ("none", "all", "oft_only"))


class Rotation(nn.Module):
    """Holds the upper triangles as ``weight``, where PEFT has them."""

    def __init__(self, blocks: int, elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(blocks, elements))


class BlockDropout(nn.Dropout):
    """The p of blocks that are replaced by the identity."""


class OFT(Adapter):
    name, prefix, Config = "oft", "oft_", OFTConfig
    _part = "oft_R"

    def build(self, base: Base, shared: Any) -> None:
        config: OFTConfig = self.config
        turned = base.shape[0] if base.indexed else math.prod(base.shape[1:])
        self._part = "oft_embedding_R" if base.indexed else "oft_R"
        if config.r:
            r = _nearest(turned, config.r, "r")
            size = turned // r
        else:
            size = _nearest(turned, config.oft_block_size, "oft_block_size")
            r = turned // size
        rotation = Rotation(1 if config.block_share else r, size * (size - 1) // 2)
        if not config.init_weights:
            nn.init.normal_(rotation.weight, std=0.1)
        p = config.module_dropout
        self.parts = {"oft_dropout": BlockDropout(p) if p > 0 else nn.Identity(),
                      self._part: rotation}  # fmt: skip
        self.values = {"r": r, "oft_block_size": size}
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        d = self._blocks(self._constrained())
        w = w.to(torch.promote_types(w.dtype, d.dtype))
        if self._part == "oft_embedding_R":
            return rotate(w.t(), d).t(), bias
        return rotate(w.flatten(1), d.transpose(1, 2)).view(w.shape), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        weight: nn.Parameter = self[self._part].weight
        if self.config.coft:
            with torch.no_grad():
                weight.copy_(self._constrained())
        if len(base.shape) > 2:
            return super().forward(x, base)
        d = self._dropped(self._blocks(weight))
        if base.indexed:
            y = base(x)
            return rotate(y, d).to(y.dtype)
        return base(rotate(x, d))

    def _blocks(self, weight: Tensor) -> Tensor:
        """R - I: (g, s, s)."""
        size: int = self["oft_block_size"]
        rows, cols = torch.triu_indices(size, size, 1, device=weight.device)
        q = weight.new_zeros(weight.shape[0], size, size)
        q[:, rows, cols] = weight
        config: OFTConfig = self.config
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        return cayley(q - q.transpose(1, 2), terms)

    def _constrained(self) -> Tensor:
        """The parameter, with each Q inside COFT's ball."""
        weight: Tensor = self[self._part].weight
        if not self.config.coft:
            return weight
        limit = self.config.eps / math.sqrt(weight.shape[0])
        # each element stands twice in Q
        norm = weight.norm(dim=1, keepdim=True) * math.sqrt(2)
        return torch.where(norm <= limit, weight, weight * (limit / norm))

    def _dropped(self, d: Tensor) -> Tensor:
        p, blocks = self.rate("oft_dropout"), d.shape[0]
        if p == 0 or blocks == 1:
            return d
        kept = torch.randperm(blocks, device=d.device) >= int(p * blocks)
        return d * kept.view(-1, 1, 1)


def _nearest(total: int, wanted: int, field: str) -> int:
    """The divisor of ``total`` that is nearest to ``wanted``, the lower of two."""
    if total % wanted == 0:
        return wanted
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    found = min(divisors, key=lambda n: (abs(n - wanted), n))
    warnings.warn(
        f"Invalid `{field}` ({wanted})! Adjusted `{field}` to ({found}).",
        FastAdaptWarning, stacklevel=2,
    )  # fmt: skip
    return found
