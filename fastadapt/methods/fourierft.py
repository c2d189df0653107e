# SPDX-License-Identifier: Apache-2.0
"""FourierFT:  W' = W + s Re ifft2(S),  S zero but for n trained numbers at random places.

    spectrum: (n,)  places: (2, n), the same in all layers of a shape

The update is made by one real transform of the size of W, n log n, and meets x in the product with
W. (Transforms of x and y around a sparse map cost more than that from 1,000 numbers on.)
Source: FourierFT (arXiv 2405.03003).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.dense import DenseDelta
from fastadapt.methods.projection import size
from fastadapt.methods.spectrum import positions
from fastadapt.targets import DEFAULT_TARGETS, pattern_value

MLP_OUT = {"gpt_bigcode": ["mlp.c_proj"], "gpt2": ["mlp.c_proj"]}


@dataclass
class FourierFTConfig(AdapterConfig):
    """PEFT's FourierFTConfig.

    n_frequency: n; scaling: s; random_loc_seed: of the places; n_frequency_pattern: pattern -> n;
    bias: "none", "all" or "fourier_only"; init_weights: True starts at the identity, False at
    N(0, 1). ``fan_in_fan_out`` has no effect: layers know how they store W.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False

    default_targets = {**DEFAULT_TARGETS, **MLP_OUT}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FOURIERFT  # type: ignore[attr-defined]
        self.n_frequency_pattern = dict(self.n_frequency_pattern or {})
        fields.count(self, "n_frequency")
        fields.choice(self, "bias", ("none", "all", "fourier_only", "fourierft_only"))
        if not isinstance(self.random_loc_seed, int):
            raise ConfigError(
                f"random_loc_seed: expected an integer, got {self.random_loc_seed!r}: files do not "
                "hold the places, the seed does"
            )

    def at(self, path: str) -> FourierFTConfig:
        if not self.n_frequency_pattern:
            return self
        n = pattern_value(self.n_frequency_pattern, path, self.n_frequency)
        return dataclasses.replace(self, n_frequency=n)


class FourierFT(DenseDelta):
    name, prefix, Config = "fourierft", "fourierft_", FourierFTConfig
    constant = ("fourierft_indices",)

    def build(self, base: Base, shared: Any) -> None:
        config: FourierFTConfig = self.config
        (out, inner), n = size(base.shape), config.n_frequency
        if n > out * inner:
            raise ConfigError(
                f"`n_frequency` should be less than or equal to the product of the input and "
                f"output dimensions but the value passed is {n} and the product is {out * inner}"
            )
        places = positions(out, inner, n, config.random_loc_seed)
        start = torch.randn(n)
        self.identity_at_init = config.init_weights  # type: ignore[misc]
        self.parts = {
            "fourierft_spectrum": nn.Parameter(start.zero_() if config.init_weights else start),
            "fourierft_indices": nn.Parameter(places, requires_grad=False),
        }
        self.values = {"fourierft_n_frequency": n, "fourierft_scaling": config.scaling,
                       "fourierft_random_loc_seed": config.random_loc_seed}  # fmt: skip

    def file_key(self, part: str, leaf: str) -> str | None:
        return None if part in self.constant else super().file_key(part, leaf)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        spectrum: Tensor = self["fourierft_spectrum"]
        args = (spectrum * self["fourierft_scaling"], self["fourierft_indices"], *size(shape))
        made: Tensor = InverseFunction.apply(*args)  # type: ignore[no-untyped-call]
        return made.to(spectrum.dtype).view(shape)


class InverseFunction(torch.autograd.Function):
    """spectrum: (n,)  places: (2, n) -> Re ifft2 of the sparse S: (out, inner), at least fp32.

    The spectrum of the real part is the mean of S and its mirror image, and its left half says all.
    """

    @staticmethod
    def forward(ctx: Any, spectrum: Tensor, places: Tensor, out: int, inner: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.dtype = spectrum.dtype
        wide = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32)) / 2
        flipped, (first, left) = -places[0] % out, _folded(places, out, inner)
        half = wide.new_zeros(out * (inner // 2 + 1)).index_add_(0, first, wide)
        # a column that is its own mirror image has both
        alone = torch.where(2 * places[1] % inner == 0, wide, 0.0)
        half.index_add_(0, flipped * (inner // 2 + 1) + left, alone)
        whole = torch.complex(half, torch.zeros_like(half)).view(out, -1)
        made: Tensor = torch.fft.irfft2(whole, s=(out, inner))
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        found = torch.fft.rfft2(g).view(-1)[_folded(places, *g.shape)[0]].real
        return (found / g.numel()).to(ctx.dtype), None, None, None


def _folded(places: Tensor, out: int, inner: int) -> tuple[Tensor, Tensor]:
    """Where each number, or its mirror image, is in the left half: flat, and its column."""
    (rows, columns), width = places, inner // 2 + 1
    beyond = columns >= width
    left = torch.where(beyond, inner - columns, columns)
    return torch.where(beyond, -rows % out, rows) * width + left, left
