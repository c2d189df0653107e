# SPDX-License-Identifier: Apache-2.0
"""PEANuT:  W' = W + s B f(W)^T,  f(W) = MLP(act(W^T A^T)), a low-rank update that W itself drives.

    A: (r, out)  B: (out, r)  encoders, decoders: ``depth`` of (r, r) each, joined by residuals

The MLP runs over the input channels, not over tokens; its result (in, r) is the low-rank A of the
layer, so a step costs LoRA's products and two thin products with W (three in backward).
Source: PEANuT (arXiv 2410.01870).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastadapt.adapter import Adapter
from fastadapt.base import Base, Stacked, compose
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.ops.precision import product_dtype

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "leaky_relu": F.leaky_relu, "relu6": F.relu6, "mish": F.mish,
    "linear": lambda h: h, "relu2": lambda h: F.relu(h).square(),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), lambda h: F.gelu(h, approximate="tanh")
    ),
}  # fmt: skip
"""Names of transformers' table."""


@dataclass
class PeanutConfig(AdapterConfig):
    """PEFT's PeanutConfig.

    r: the width; depth: layers of the encoder and of the decoder; act_fn: a name of transformers'
    activations; scaling: s.
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PEANUT  # type: ignore[attr-defined]
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r <= 0:
            raise ConfigError(f"`r` must be a positive integer, got {self.r!r}")
        if self.depth < 0:
            raise ConfigError("`depth` can only be a non-negative integer.")
        if self.act_fn not in _ACTIVATIONS:
            raise ConfigError(
                f"Unsupported `act_fn`: {self.act_fn}. Must be one of {sorted(_ACTIVATIONS)}."
            )


class Peanut(Adapter):
    name, prefix, Config = "peanut", "peanut_", PeanutConfig

    def build(self, base: Base, shared: Any) -> None:
        config: PeanutConfig = self.config
        n, r, depth = base.shape[0], config.r, config.depth
        a = nn.Linear(n, r, bias=False)
        encoders, decoders = (
            nn.ModuleList([nn.Linear(r, r, bias=False) for _ in range(depth)]) for _ in range(2)
        )
        b = nn.Linear(r, n, bias=False)
        for layer in (a, *encoders, *decoders):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(b.weight)
        else:
            nn.init.kaiming_uniform_(b.weight, a=math.sqrt(5))
        self.parts = {"peanut_A": a, "peanut_B": b, "peanut_encoders": encoders,
                      "peanut_decoders": decoders}  # fmt: skip
        self.values = {"r": r, "depth": depth, "res_num": depth, "act_fn": config.act_fn,
                       "scaling": config.scaling}  # fmt: skip
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        b: Tensor = self["peanut_B"].weight
        w = w.to(torch.promote_types(w.dtype, b.dtype))
        delta = compose(self._low(self["peanut_A"].weight @ w.flatten(1)), b).view(w.shape)
        return w + delta * self["scaling"], bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        # adapters below learn too, through W: ``Seen`` has no gradient for them
        if base.groups > 1 or isinstance(base, Stacked):
            return super().forward(x, base)
        seen = Seen.apply(self["peanut_A"].weight, base.read)  # type: ignore[no-untyped-call]
        a = self._low(seen).view(-1, *base.shape[1:])
        return base.low_rank(x, a, self["peanut_B"].weight, self["scaling"])

    def _low(self, seen: Tensor) -> Tensor:
        """act(A W) and the layers after it: (r, in)."""
        act = _ACTIVATIONS[self["act_fn"]]
        h = act(seen)
        residuals = []
        for encoder in self["peanut_encoders"]:
            residuals.append(h)
            h = act(encoder.weight @ h)
        for decoder in self["peanut_decoders"]:
            h = act(decoder.weight @ h) + residuals.pop()
        return h


class Seen(torch.autograd.Function):
    """a: (r, n) -> a W: (r, k), in the dtype of a. W is read again for backward, not kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, read: Callable[[], tuple[Tensor, Tensor | None]]) -> Tensor:
        ctx.read = read
        w = read()[0].flatten(1)
        low = product_dtype(w.dtype, w.device)
        return (a.to(low) @ w.to(low)).to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        w = ctx.read()[0].flatten(1)
        low = product_dtype(w.dtype, w.device)
        return (g.to(low) @ w.to(low).t()).to(g.dtype), None
