# SPDX-License-Identifier: Apache-2.0
"""LoKr:  W' = W + s W1 (x) W2,  s = alpha / r,  (x) the Kronecker product.

    W1: (a, c)  W2: (b, d, *kernel), out = a b, in = c d; each may be a product of rank r

(W1 (x) W2) x = W1 (W2 x_1 .. W2 x_c) with x cut into c pieces of d, so that delta W is never made.
With ``use_effective_conv2d`` W2 is a core (r, r, *kernel) between (r, b) and (r, d).
Source: LyCORIS (arXiv 2309.14859).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import PeftType
from fastadapt.methods import fields
from fastadapt.methods.dense import again
from fastadapt.methods.lycoris import (
    Lycoris,
    LycorisConfig,
    core_product,
    core_shape,
    empty,
    uniform_,
)  # fmt: skip
from fastadapt.ops.precision import compute_dtype


@dataclass
class LoKrConfig(LycorisConfig):
    """PEFT's LoKrConfig.

    decompose_both: W1 may be of rank r too; decompose_factor: the wanted size of W1, -1 is near the
    square root; rank_dropout_scale: rows that are kept grow; init_weights: True starts with W1 = 0,
    "lycoris" with W2 = 0, False with all at random.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    @classmethod
    def of_earlier(cls, values: dict[str, Any]) -> dict[str, Any]:
        """PEFT before 0.14, whose files lack rank_dropout_scale, left out s."""
        if "rank_dropout_scale" in values:
            return values
        ranks = {"alpha": values.get("r", 8), "alpha_pattern": values.get("rank_pattern") or {}}
        return {**values, **ranks, "rank_dropout_scale": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOKR  # type: ignore[attr-defined]
        fields.choice(self, "init_weights", (True, False, "lycoris"))
        if self.decompose_factor != -1:
            fields.count(self, "decompose_factor")


class LoKr(Lycoris):
    name, prefix, Config = "lokr", "lokr_", LoKrConfig

    def build(self, base: Base, shared: Any) -> None:
        config: LoKrConfig = self.config
        (out, inner, *kernel), r = base.shape, config.r
        (a, b), (c, d) = (factorise(n, config.decompose_factor) for n in (out, inner))
        size = 1
        for length in kernel:
            size *= length
        parts = {"lokr_w1": empty(a, c)}
        if config.decompose_both and r < max(a, c) / 2:
            parts = {"lokr_w1_a": empty(a, r), "lokr_w1_b": empty(r, c)}
        self._two = "full"
        if r >= max(b, d) / 2:
            parts["lokr_w2"] = empty(b, d, *kernel)
        elif config.use_effective_conv2d and size > 1:
            self._two = "core"
            parts["lokr_w2_a"], parts["lokr_w2_b"] = empty(r, b), empty(r, d)
            parts["lokr_t2"] = empty(*core_shape(r, kernel))
        else:
            self._two = "pair"
            parts["lokr_w2_a"], parts["lokr_w2_b"] = empty(b, r), empty(r, d * size)
        # PEFT multiplies a conv1d's full W2 axis by axis from the right, (1, a, c) (x)
        # (b, d, kernel), and calls the result (out, in, kernel); its files mean that
        self._scrambled = self._two == "full" and len(kernel) == 1
        self._one = "full" if "lokr_w1" in parts else "pair"
        zero = ""
        if config.init_weights is True:
            zero = next(iter(parts))
        elif config.init_weights == "lycoris":
            zero = "lokr_w2" if self._two == "full" else "lokr_w2_b"
        # PEFT draws the second factor of a zeroed pair first
        order = sorted(parts, key=lambda n: (n == "lokr_t2", n[6:7] == "2", n == zero))
        for name in order:
            nn.init.zeros_(parts[name]) if name == zero else uniform_(parts[name])
        self.rescaled = config.rank_dropout_scale
        self.parts = dict(parts)
        self.values = {
            **self.plain_values(), "rank_dropout_scale": config.rank_dropout_scale,
            "pieces": (a, b, c, d),
        }  # fmt: skip

    def factors(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(W1, W2)."""
        one: Tensor = (
            self["lokr_w1"] if self._one == "full" else self["lokr_w1_a"] @ self["lokr_w1_b"]
        )
        if self._two == "full":
            two: Tensor = self["lokr_w2"]
        elif self._two == "pair":
            two = self["lokr_w2_a"] @ self["lokr_w2_b"]
        else:
            two = core_product(self["lokr_t2"], self["lokr_w2_a"], self["lokr_w2_b"])
        _, b, _, d = self["pieces"]
        return one, two.reshape(b, d, *shape[2:])

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        one, two = self.factors(shape)
        scale: float = self["scaling"]
        if self._scrambled:
            return torch.kron(one.unsqueeze(0), two).reshape(shape) * scale
        b, d = two.shape[:2]
        kron = one[:, None, :, None, None] * two.reshape(b, d, -1)[None, :, None]
        return kron.reshape(shape) * scale

    def forward(self, x: Tensor, base: Base) -> Tensor:
        kept = self.keep(base)
        if base.indexed or base.groups > 1 or self._scrambled:
            return self.dense(x, base, kept)
        y = base(x)
        # what stands between the factors is as large as x: made again for backward
        extra = again(lambda t: self._extra(t, base), x.to(compute_dtype(x)))
        return y + (extra if kept is None else extra * base.channels(kept)).to(y.dtype)

    def _extra(self, x: Tensor, base: Base) -> Tensor:
        """delta W x through the factors."""
        factors, scale = self.factors(base.shape), self["scaling"]
        one, two = (factors[0] * scale).to(x.dtype), factors[1].to(x.dtype)
        c, d = self["pieces"][2:]
        if len(base.shape) == 2:
            pieces = F.linear(x.reshape(*x.shape[:-1], c, d), two)
            return F.linear(pieces.transpose(-1, -2), one).transpose(-1, -2).flatten(-2)
        axis = x.dim() - len(base.shape) + 1
        pieces = base.apply(x.unflatten(axis, (c, d)).flatten(0, axis), two)
        across: Tensor = one @ pieces.reshape(-1, c, pieces[0].numel())
        return across.reshape(*x.shape[:axis], -1, *pieces.shape[2:])


def factorise(n: int, factor: int = -1) -> tuple[int, int]:
    """(m, n / m), m <= n / m the divisor that PEFT takes: ``factor`` itself if it divides n, else
    one at most ``factor``, the nearest to the square root."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = n if factor == -1 else factor
    small, large = 1, n
    while small < large:
        step = next(i for i in range(small + 1, n + 1) if n % i == 0)
        if step > limit or step + n // step > small + large:
            break
        small, large = step, n // step
    return min(small, large), max(small, large)
