# SPDX-License-Identifier: Apache-2.0
"""RoAd:  W' = R W, bias' = R bias, where R scales and turns pairs of output channels:

    y1' = a1 cos(t1) y1 - b1 sin(u1) y2,   y2' = b2 sin(u2) y1 + a2 cos(t2) y2

    road_1: one angle and one scale a pair, (out / 2,); road_2: one a channel, (out,);
    road_4: cosines and sines have their own, (2 out,)

Channel j of the first half of a group of ``group_size`` goes with channel j of the second half.
Source: RoAd (arXiv 2409.00119).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, UnsupportedError

_SIZES = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}


@dataclass
class RoadConfig(AdapterConfig):
    """PEFT's RoadConfig.

    variant: road_1, road_2 or road_4; group_size: even, divides the output channels;
    init_weights: start as the identity.
    """

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    without = ("exclude_modules", "layers_to_transform", "layers_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ROAD  # type: ignore[attr-defined]
        if self.variant not in _SIZES:
            raise ConfigError(
                f"Invalid variant {self.variant!r} specified. Please choose from road_1, road_2 or "
                "road_4"
            )
        if self.group_size <= 0 or self.group_size % 2:
            raise ConfigError(
                "The group_size must be divisible by 2 when using RoadLayer, but got "
                f"{self.group_size}."
            )


class Road(Adapter):
    name, prefix, Config = "road", "road_", RoadConfig

    def build(self, base: Base, shared: Any) -> None:
        config: RoadConfig = self.config
        out, group = base.shape[0], config.group_size
        if out % group:
            raise UnsupportedError(
                f"The out_features of the base layer must be divisible by group_size ({group}) "
                f"when using RoadLayer. It has {out}."
            )
        times, parts = _SIZES[config.variant]
        theta = nn.Parameter(torch.zeros(out * times // parts))
        alpha = nn.Parameter(torch.ones(out * times // parts))
        if not config.init_weights:
            nn.init.normal_(theta, mean=0.0, std=0.5)
            nn.init.normal_(alpha, mean=1.0, std=0.5)
        self.parts = {"road_theta": theta, "road_alpha": alpha}
        self.values = {"variant": config.variant, "group_size": group}
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w = w.to(torch.promote_types(w.dtype, self["road_theta"].dtype))
        return self._turned(w, 0), None if bias is None else self._turned(bias, 0)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return self._turned(y, y.dim() + 1 - len(base.shape))

    def _turned(self, y: Tensor, dim: int) -> Tensor:
        """R over the channels of y, its dimension ``dim``."""
        args = (*self._columns(), self["group_size"], dim)
        return TurnFunction.apply(y, *args)  # type: ignore[no-untyped-call,no-any-return]

    def _columns(self) -> tuple[Tensor, Tensor]:
        """(the diagonal of R - I, what multiplies the partner), one value a channel.

        Less the identity, because a small turn's cosine is 1 in half precision."""
        theta, alpha = self["road_theta"], self["road_alpha"]
        group: int = self["group_size"]
        if self["variant"] == "road_1":
            theta, alpha = (v.view(-1, 1, group // 2).repeat(1, 2, 1) for v in (theta, alpha))
        if self["variant"] == "road_4":
            theta, alpha = theta.view(-1, 2, group), alpha.view(-1, 2, group)
            cosine, sine = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
        else:
            cosine, sine = alpha * theta.cos(), alpha * theta.sin()
        sine = sine.reshape(-1, 2, group // 2)
        signed = torch.cat([-sine[:, :1], sine[:, 1:]], 1)
        return cosine.flatten() - 1, signed.flatten()


class TurnFunction(torch.autograd.Function):
    """y + more y + across swap(y), where swap exchanges the halves of each group of channels.

    y: (.., c, ..)  more, across: (c,);  saved: y, once"""

    @staticmethod
    def forward(ctx: Any, y: Tensor, more: Tensor, across: Tensor, group: int, dim: int) -> Tensor:
        ctx.save_for_backward(y, more, across)
        ctx.group, ctx.dim = group, dim
        more, across = (_beside(v, y, dim) for v in (more, across))
        return torch.addcmul(y, y, more).addcmul_(_swap(y, group, dim), across)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, more, across = ctx.saved_tensors
        need_y, group, dim = ctx.needs_input_grad[0], ctx.group, ctx.dim
        others = [i for i in range(g.dim()) if i != dim]
        wide = torch.promote_types(g.dtype, torch.float32)

        def total(t: Tensor) -> Tensor:
            return (t.sum(others, dtype=wide) if others else t).to(more.dtype)

        dmore, dacross = total(g * y), total(g * _swap(y, group, dim))
        if not need_y:
            return None, dmore, dacross, None, None
        turned = _swap(g * _beside(across, g, dim), group, dim)
        return turned.add_(g).addcmul_(g, _beside(more, g, dim)), dmore, dacross, None, None


def _beside(v: Tensor, y: Tensor, dim: int) -> Tensor:
    return v.to(y.dtype).view(-1, *[1] * (y.dim() - 1 - dim))


def _swap(y: Tensor, group: int, dim: int) -> Tensor:
    halves = y.unflatten(dim, (-1, 2, group // 2))
    swapped: Tensor = halves.flip(dim + 1)
    return swapped.flatten(dim, dim + 2)
