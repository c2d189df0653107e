# SPDX-License-Identifier: Apache-2.0
"""BOFT:  W' = diag(s) W B^T,  B = B_N .. B_1,  B_i = P_i diag(R_i1 .. R_ig) P_i^T, a butterfly.

    boft_R: (N, g, b, b), R = (I - Q) (I + Q)^-1 of its skew-symmetric part Q;  g b = in
    boft_s: (out, 1); on convolutions (1, out), and in is the whole patch

P_i takes blocks of b/2 channels apart in segments of 2^(i-1) b, evens before odds. N factors mix
segments of 2^(N-1) b channels, so B is block-diagonal, too: up to 128 channels the product of the
small blocks is made first and the input is turned once; a wider butterfly is applied factor by
factor. PEFT builds B as dense (in, in) matrices (7.35 x LoRA's step), and drops to N = 1 without
saying so in the config where its CUDA extension cannot be built.
Source: BOFT (arXiv 2311.06243).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, UnsupportedError
from fastadapt.methods import fields
from fastadapt.methods.dense import again
from fastadapt.methods.oft import BlockDropout
from fastadapt.ops.rotate import cayley, rotate

_WIDEST = 128


@dataclass
class BOFTConfig(AdapterConfig):
    """PEFT's BOFTConfig.

    boft_block_size: b, or boft_block_num: g; one of them is 0; boft_n_butterfly_factor: N, at
    least 1; boft_dropout: share of the blocks of one factor that is the identity in training.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BOFT  # type: ignore[attr-defined]
        size, num = self.boft_block_size, self.boft_block_num
        if size < 0 or num < 0 or (size == 0) == (num == 0):
            raise ConfigError(
                "exactly one of `boft_block_size` and `boft_block_num` must be non-zero (and "
                "positive), because boft_block_size x boft_block_num == in_features. Currently, "
                f"boft_block_size = {size} and boft_block_num = {num}."
            )
        if self.boft_n_butterfly_factor < 1:
            raise ConfigError(
                "You can only specify boft_n_butterfly_factor "
                f"{self.boft_n_butterfly_factor} to be a positive integer number."
            )
        fields.rate(self, "boft_dropout")
        fields.choice(self, "bias", ("none", "all", "boft_only"))


class BOFT(Adapter):
    name, prefix, Config = "boft", "boft_", BOFTConfig
    old_parts: ClassVar[dict[str, str | None]] = {"boft_P": None}

    def build(self, base: Base, shared: Any) -> None:
        config: BOFTConfig = self.config
        k, factors = math.prod(base.shape[1:]), config.boft_n_butterfly_factor
        num, size = config.boft_block_num, config.boft_block_size
        if k % (num or size):
            name = "boft_block_num" if num else "boft_block_size"
            raise UnsupportedError(
                f"in_features ({k}) must be divisible by {name} ({num or size})!"
            )
        num, size = (num, k // num) if num else (k // size, size)
        if factors > 1 and (num % 2 ** (factors - 1) or size % 2):
            raise UnsupportedError(
                f"Invalid combination of in_features ({k}), boft_n_butterfly_factor ({factors}), "
                f"boft_block_size ({size}) and boft_block_num ({num}): the blocks must be of even "
                f"size and their number a multiple of 2 ** {factors - 1}"
            )
        out = base.shape[0]
        r = nn.Parameter(torch.zeros(factors, num, size, size))
        s = nn.Parameter(torch.ones((out, 1) if len(base.shape) == 2 else (1, out)))
        if not config.init_weights:
            nn.init.normal_(r, mean=0.0, std=0.1)
            nn.init.normal_(s, mean=1.0, std=0.1)
        p = config.boft_dropout
        self.parts = {"boft_dropout": BlockDropout(p) if p > 0 else nn.Identity(),
                      "boft_R": r, "boft_s": s}  # fmt: skip
        self.values = {"boft_block_size": size, "boft_block_num": num}
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        s: Tensor = self["boft_s"]
        w = w.to(torch.promote_types(w.dtype, s.dtype))
        turned = rotate(w.flatten(1), _product(self._blocks()).transpose(1, 2))
        return (turned * s.view(-1, 1)).view(w.shape), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if base.indexed or len(base.shape) > 2:
            return super().forward(x, base)
        d = self._dropped(self._blocks())
        factors, _, size, _ = d.shape
        if size << factors - 1 > _WIDEST:
            turned = _butterfly(x, d)
        else:
            # the factors' product is small to make, and its parts are not small to keep
            turned = rotate(x, d[0] if factors == 1 else again(_product, d))
        y = base(turned)
        # s - 1 is exact in half precision where s would be rounded to 1
        more = base.channels(self["boft_s"].flatten() - 1).to(y.dtype)
        if base.bias is None:
            return torch.addcmul(y, y, more)
        bias = base.channels(base.bias).to(y.dtype)
        return torch.addcmul(y - bias * more, y, more)

    def _blocks(self) -> Tensor:
        """R - I: (N, g, b, b)."""
        r: Tensor = self["boft_R"]
        skew = 0.5 * (r - r.transpose(2, 3))
        return cayley(skew.flatten(0, 1)).view(r.shape)

    def _dropped(self, d: Tensor) -> Tensor:
        """One factor, drawn at random, has a share p of its blocks replaced."""
        p = self.rate("boft_dropout")
        if p == 0:
            return d
        factors, num = d.shape[:2]
        chosen = torch.randint(0, factors, (1,), device=d.device)
        dropped = torch.randperm(num, device=d.device) < int(p * num)
        factor = torch.arange(factors, device=d.device) == chosen
        return d * (~(factor[:, None] & dropped)).view(factors, num, 1, 1)


def _butterfly(x: Tensor, d: Tensor) -> Tensor:
    """x B: the last factor first. x: (..., k), k any multiple of the segments of ``d``."""
    for i in range(d.shape[0] - 1, -1, -1):
        x = rotate(x, d[i], 2**i)
    return x


def _product(d: Tensor) -> Tensor:
    """B - I as the blocks that it has: (k / s, s, s), s = 2^(N-1) b."""
    factors, num, size, _ = d.shape
    if factors == 1:
        return d[0]
    segment = size << factors - 1
    eye = torch.eye(segment, dtype=d.dtype, device=d.device)
    count = num * size // segment
    rows = _butterfly(eye.repeat(1, count), d)
    return rows.view(segment, count, segment).transpose(0, 1) - eye
