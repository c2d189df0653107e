# SPDX-License-Identifier: Apache-2.0
"""FourierFT:  W' = W + s Re ifft2(S),  S zero but for n trained numbers at random places.

    spectrum: (n,)  places: (2, n), the same in all layers of a shape

With C = S[row, column] the update is  delta x = (s / in) irfft_out(M rfft_in(x)): both transforms
act on x and y, and M maps half-spectra, one complex number an entry, so that delta W is never made.
For backward x is kept, its spectrum made again.
Source: FourierFT (arXiv 2405.03003).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.projection import size
from fastadapt.methods.spectrum import gather_add, inner_products, positions
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


class FourierFT(Adapter):
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
        rows, columns = self["fourierft_indices"]
        wide = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
        dense = wide.new_zeros(size(shape)).index_put((rows, columns), wide)
        made: Tensor = torch.fft.ifft2(dense).real * self["fourierft_scaling"]
        return made.to(spectrum.dtype).view(shape)

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self.delta(tuple(w.shape))
        return w.to(delta.dtype) + delta.to(w.device), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        if base.indexed or len(base.shape) > 2:
            delta = self.delta(base.shape)
            x = x if base.indexed else x.to(delta.dtype)
            return y + base.apply(x, delta).to(y.dtype)
        args = (self["fourierft_spectrum"], self["fourierft_indices"], base.shape[0])
        scale: float = self["fourierft_scaling"]
        made: Tensor = FourierFunction.apply(x, *args)  # type: ignore[no-untyped-call]
        return y + (made * scale).to(y.dtype)


class FourierFunction(torch.autograd.Function):
    """x: (..., in)  spectrum: (n,)  places: (2, n) -> Re ifft2(S) x: (..., out), at least fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spectrum: Tensor, places: Tensor, out: int) -> Tensor:
        ctx.save_for_backward(x, spectrum, places)
        ctx.out = out
        h = _half_spectra(x)
        y = _through(h, spectrum, places[1], places[0], x.shape[-1], out)
        return y.view(*x.shape[:-1], out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, spectrum, places = ctx.saved_tensors
        inner, out = x.shape[-1], ctx.out
        h = _half_spectra(g)
        dx = ds = None
        if ctx.needs_input_grad[0]:
            dx = _through(h, spectrum, places[0], places[1], out, inner).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            target, source, sign = _entries(places[1], places[0], inner, out)
            places = _both(target, out), _both(source, inner)
            real, imaginary = inner_products(h, _half_spectra(x), *places).chunk(2)
            ds = ((real + sign * imaginary) / (inner * out)).to(spectrum.dtype)
        return dx, ds, None, None


def _half_spectra(x: Tensor) -> Tensor:
    """(..., k) -> (2 h, tokens), h = k / 2 + 1: real parts, then imaginary parts."""
    rows = x.reshape(-1, x.shape[-1])
    found = torch.fft.rfft(rows.to(torch.promote_types(rows.dtype, torch.float32))).t()
    return torch.cat([found.real, found.imag])


def _entries(columns: Tensor, rows: Tensor, inner: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target and source among the half-spectra's real parts, and +1 or -1 for the imaginary part:
    an index in the upper half is the conjugate of its mirror image, and so is the wave of each
    ifft."""
    upper_in, upper_out = columns > inner // 2, rows > out // 2
    source = torch.where(upper_in, inner - columns, columns)
    target = torch.where(upper_out, out - rows, rows)
    return target, source, torch.where(upper_in ^ upper_out, 1.0, -1.0)


def _both(part: Tensor, count: int) -> Tensor:
    """The rows of the real parts and of the imaginary parts, of half-spectra of ``count``."""
    return torch.cat([part, part + (count // 2 + 1)])


def _through(
    h: Tensor, spectrum: Tensor, columns: Tensor, rows: Tensor, inner: int, out: int
) -> Tensor:
    """Half-spectra of the input -> the output, (tokens, out)."""
    target, source, sign = _entries(columns, rows, inner, out)
    # irfft counts each inner frequency twice, and takes no imaginary part of the two at the ends
    ends = (target == 0) | (2 * target == out)
    s = spectrum.to(h.dtype) / inner
    factor = torch.cat([torch.where(ends, s, s / 2), torch.where(ends, 0.0, s / 2 * sign)])
    half = out // 2 + 1
    made = gather_add(h, _both(source, inner), _both(target, out), factor, 2 * half)
    y: Tensor = torch.fft.irfft(torch.complex(made[:half].t(), made[half:].t()), n=out)
    return y
