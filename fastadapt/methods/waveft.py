# SPDX-License-Identifier: Apache-2.0
"""WaveFT:  W' = W + s idwt2(S),  S zero but for n trained numbers at random places.

    spectrum: (n,)  places: (2, n), the same in all layers of a shape

A coefficient of one level is a patch of the weight, as wide as the filters: delta W is a few small
patches added up, and meets x in the product with W.
Source: WaveFT (arXiv 2505.12532).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.dense import DenseDelta
from fastadapt.methods.fourierft import MLP_OUT
from fastadapt.methods.projection import size
from fastadapt.methods.spectrum import positions
from fastadapt.methods.wavelets import coefficients, filters, support, synthesise
from fastadapt.targets import DEFAULT_TARGETS, pattern_value


@dataclass
class WaveFTConfig(AdapterConfig):
    """PEFT's WaveFTConfig.

    n_frequency: n; scaling: s; wavelet_family: db1 to db10, sym2 to sym10, coif1 to coif3;
    use_idwt: False takes S itself for the update; random_loc_seed: of the places;
    n_frequency_pattern: pattern -> n; proportional_parameters: n follows the size of the layer,
    with ``n_frequency`` its mean; bias: "none", "all" or "waveft_only"; init_weights: True starts
    at the identity. ``fan_in_fan_out`` has no effect: layers know how they store W.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    default_targets = {**DEFAULT_TARGETS, **MLP_OUT}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.WAVEFT  # type: ignore[attr-defined]
        self.n_frequency_pattern = dict(self.n_frequency_pattern or {})
        fields.count(self, "n_frequency")
        fields.choice(self, "bias", ("none", "all", "waveft_only"))
        filters(self.wavelet_family)
        if not isinstance(self.random_loc_seed, int):
            raise ConfigError(f"random_loc_seed: expected an integer, got {self.random_loc_seed!r}")

    def at(self, path: str) -> WaveFTConfig:
        if not self.n_frequency_pattern:
            return self
        n = pattern_value(self.n_frequency_pattern, path, self.n_frequency)
        return dataclasses.replace(self, n_frequency=n)


class WaveFT(DenseDelta):
    name, prefix, Config = "waveft", "waveft_", WaveFTConfig
    constant = ("waveft_indices",)

    @classmethod
    def shared(cls, config: WaveFTConfig, bases: dict[str, Base]) -> dict[int, int]:
        """Under each base's id its own n, when n follows the size."""
        if not config.proportional_parameters:
            return {}
        counts = {id(b): size(b.shape)[0] * size(b.shape)[1] for b in bases.values()}
        budget, total = config.n_frequency * len(bases), sum(counts.values())
        return {key: max(1, round(count / total * budget)) for key, count in counts.items()}

    def build(self, base: Base, shared: dict[int, int]) -> None:
        config: WaveFTConfig = self.config
        out, inner = size(base.shape)
        n = shared.get(id(base), config.n_frequency)
        if n > out * inner:
            raise ConfigError(
                f"`n_frequency` should be less than or equal to the product of the input and "
                f"output dimensions but the value passed is {n} and the product is {out * inner}"
            )
        start = torch.zeros(n) if config.init_weights else torch.randn(n) * 0.01
        places = positions(out, inner, n, config.random_loc_seed)
        self.identity_at_init = config.init_weights  # type: ignore[misc]
        self.parts = {
            "waveft_spectrum": nn.Parameter(start),
            "waveft_indices": nn.Parameter(places, requires_grad=False),
        }
        self.values = {
            "waveft_n_frequency": n, "waveft_scaling": config.scaling,
            "waveft_random_loc_seed": config.random_loc_seed, "waveft_use_idwt": config.use_idwt,
            "waveft_wavelet_family": config.wavelet_family,
            "waveft_filters": filters(config.wavelet_family) if config.use_idwt else None,
        }  # fmt: skip

    def file_key(self, part: str, leaf: str) -> str | None:
        return None if part in self.constant else super().file_key(part, leaf)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        spectrum: Tensor = self["waveft_spectrum"]
        (out, inner), pair = size(shape), self["waveft_filters"]
        scale: float = self["waveft_scaling"]
        target, source = self._entries(out, inner)
        if pair is None:
            made = spectrum.new_zeros(out * inner).index_add(0, target * inner + source, spectrum)
        elif spectrum.numel() * len(pair[0]) ** 2 < out * inner:
            # a coefficient is a small patch of the weight
            rows, left = support(target, out, pair, spectrum.dtype)
            columns, right = support(source, inner, pair, spectrum.dtype)
            places = (rows * inner).unsqueeze(2) + columns.unsqueeze(1)
            patches = (spectrum.unsqueeze(1) * left).unsqueeze(2) * right.unsqueeze(1)
            made = spectrum.new_zeros(out * inner).index_add(0, places.flatten(), patches.flatten())
        else:
            h, k = coefficients(out, pair), coefficients(inner, pair)
            grid = spectrum.new_zeros(2 * h, 2 * k).index_put((target, source), spectrum)
            made = synthesise(synthesise(grid, out, pair).t(), inner, pair).t()
        return made.reshape(shape) * scale

    def _entries(self, out: int, inner: int) -> tuple[Tensor, Tensor]:
        """Target and source of each entry among the coefficients. S is PEFT's: in the middle of a
        grid of 2 h numbers a side; its lower half is detail along the input and its right half
        detail along the output, positions in each half alike."""
        (rows, columns), pair = self["waveft_indices"], self["waveft_filters"]
        if pair is None:
            return rows, columns
        h, k = coefficients(out, pair), coefficients(inner, pair)
        rows, columns = rows + (2 * h - out) // 2, columns + (2 * k - inner) // 2
        return rows % h + h * (columns >= k), columns % k + k * (rows >= h)
