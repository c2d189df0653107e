# SPDX-License-Identifier: Apache-2.0
"""C3A:  W' = W + C(w) / in,  C made of circulant blocks:  y_i = sum_j  w_ij correlated with x_j.

    w: (out / b, in / b, b)  x in blocks of b: (tokens, in / b, b)

A correlation is a product of spectra, conj(rfft w) rfft(x), so that the update costs 1 / b of the
dense product and two transforms. For backward x is kept, its spectrum made again.
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

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import UnsupportedError
from fastadapt.methods import fields
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


class C3A(Adapter):
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

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self._delta(tuple(w.shape))
        return w.to(delta.dtype) + delta.to(w.device), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        if base.indexed or len(base.shape) > 2:
            delta = self._delta(base.shape)
            x = x if base.indexed else x.to(delta.dtype)
            return y + base.apply(x, delta).to(y.dtype)
        made: Tensor = CorrelateFunction.apply(x, self["c3a_kernel"])  # type: ignore[no-untyped-call]
        return y + (made / x.shape[-1]).to(y.dtype)

    def _delta(self, shape: tuple[int, ...]) -> Tensor:
        kernel: Tensor = self["c3a_kernel"]
        out, inner = size(shape)
        step = torch.arange(kernel.shape[2], device=kernel.device)
        blocks = kernel[:, :, (step - step[:, None]) % kernel.shape[2]]
        return blocks.transpose(1, 2).reshape(out, inner).view(shape) / inner


class CorrelateFunction(torch.autograd.Function):
    """x: (..., n b)  w: (m, n, b) -> (..., m b), at least fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        b = w.shape[2]
        y = torch.einsum("tnf,mnf->tmf", _spectra(_blocks(x, b)), _spectra(w).conj())
        made: Tensor = torch.fft.irfft(y, n=b)
        return made.reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        b = w.shape[2]
        h = _spectra(_blocks(g, b))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.fft.irfft(torch.einsum("tmf,mnf->tnf", h, _spectra(w)), n=b)
            dx = dx.reshape(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = torch.einsum("tmf,tnf->mnf", h.conj(), _spectra(_blocks(x, b)))
            dw = torch.fft.irfft(dw, n=b).to(w.dtype)
        return dx, dw


def _spectra(blocks: Tensor) -> Tensor:
    """rfft of each block: (.., b) -> (.., b / 2 + 1)."""
    made: Tensor = torch.fft.rfft(blocks.to(torch.promote_types(blocks.dtype, torch.float32)))
    return made


def _blocks(x: Tensor, b: int) -> Tensor:
    """(.., n b) -> (tokens, n, b)."""
    return x.reshape(-1, x.shape[-1] // b, b)
