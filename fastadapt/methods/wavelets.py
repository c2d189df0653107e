# SPDX-License-Identifier: Apache-2.0
"""Orthonormal wavelet filters and one level of their synthesis, along the first dimension.

    h smooth and then h detail coefficients (2 h, tokens) -> (k, tokens);
    h = ceil((k + length - 2) / 2)

Daubechies filters come from the roots of the polynomial sum C(N-1+i, i) y^i; symlets take other
roots of the same pairs. Source: Daubechies, Ten Lectures on Wavelets, chapters 6 and 8.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.errors import ConfigError

Filters = tuple[tuple[float, ...], tuple[float, ...]]

_FLIPPED = {2: 0, 3: 0, 4: 1, 5: 2, 6: -2, 7: -3, 8: 5, 9: -9, 10: 21}
"""Symlet order -> which roots (a bit each, by real part) are taken outside the unit circle; minus:
the filter runs backwards."""

_COIFLETS = {
    1: (-0.05142972847076845, 0.23892972847076846, 0.6028594569415369, 0.2721405430584631,
        -0.05142972847076845, -0.011070271529231544),
    2: (0.011587596738716868, -0.029320137983468563, -0.04763959031100813, 0.2730210465347666,
        0.5746823938568638, 0.2948671936956192, -0.05408560709171143, -0.042026480460771606,
        0.016744410163279506, 0.003967883612962012, -0.0012892033561406595,
        -0.0005095053991076441),
    3: (-0.0026824186709220686, 0.005503126707831385, 0.016583560479170346,
        -0.046507764478726975, -0.043220763560211914, 0.28650333527364746, 0.56128525687033,
        0.30298357177282415, -0.050770140754888865, -0.05819625076158553, 0.024434094321166958,
        0.011229240962037866, -0.006369601011048823, -0.0018204589155662422,
        0.0007902051009575939, 0.000329665173793183, -5.019277455327665e-05,
        -2.4465734255308132e-05),
}  # fmt: skip

FAMILIES = (
    *(f"db{n}" for n in range(1, 11)),
    *(f"sym{n}" for n in _FLIPPED),
    *(f"coif{n}" for n in _COIFLETS),
)


@lru_cache
def filters(family: str) -> Filters:
    """(smooth, detail) of the synthesis, each of even length; the smooth one sums to sqrt(2)."""
    if family not in FAMILIES:
        raise ConfigError(
            f"Wavelet family {family} not supported. Supported wavelet families are: "
            f"{', '.join(FAMILIES)} (coif4 and coif5 are not orthonormal in PEFT's table)"
        )
    name, order = family.rstrip("0123456789"), int(family.lstrip("abcdefghijklmnopqrstuvwxyz"))
    if name == "coif":
        low = list(_COIFLETS[order])
    else:
        low = _from_roots(order, _FLIPPED[order] if name == "sym" else 0)
    low = [v * math.sqrt(2) / math.fsum(low) for v in low]
    high = [(-1) ** i * v for i, v in enumerate(reversed(low))]
    return tuple(low), tuple(high)


def coefficients(k: int, pair: Filters) -> int:
    """h, for k values."""
    return (k + len(pair[0]) - 1) // 2


def support(index: Tensor, k: int, pair: Filters, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which of the k values a coefficient is in, and with which weight: (n,) -> (n, length) twice;
    weights beyond the ends are 0."""
    h, length = coefficients(k, pair), len(pair[0])
    first = 2 * (index % h) - length + 2
    places = first.unsqueeze(1) + torch.arange(length, device=index.device)
    weights = _table(pair, dtype, index.device)[(index >= h).long()]
    return places.clamp(0, k - 1), weights * ((places >= 0) & (places < k))


def synthesise(u: Tensor, k: int, pair: Filters) -> Tensor:
    h, length = u.shape[0] // 2, len(pair[0])
    made = u.new_zeros(2 * h + length - 2, *u.shape[1:])
    for i in range(length):
        made[i : i + 2 * h : 2] += pair[0][i] * u[:h] + pair[1][i] * u[h:]
    return made[length - 2 : length - 2 + k]


@lru_cache
def _table(pair: Filters, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(pair, dtype=dtype, device=device)


def _from_roots(order: int, flipped: int) -> list[float]:
    """(1 + z)^N times (z - root) for one root of each pair (root, 1 / root)."""
    with torch.device("cpu"):
        made = torch.ones(1, dtype=torch.complex128)
        for number, group in enumerate(_groups(order)):
            for root in group:
                outside = abs(flipped) >> number & 1
                made = _times(made, -1 / root if outside else -root)
        for _ in range(order):
            made = _times(made, 1.0)
        low: list[float] = made.real.tolist()
    return low[::-1] if flipped < 0 else low


def _groups(order: int) -> list[list[complex]]:
    """Roots inside the unit circle, a real one or two conjugates together, by real part."""
    n = order - 1
    if n == 0:
        return []
    top = math.comb(2 * n, n)
    companion = torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    companion[:, -1] = torch.tensor(
        [-math.comb(n + i, i) / top for i in range(n)], dtype=torch.float64
    )
    inside = []
    for y in torch.linalg.eigvals(companion).tolist():
        b = 2 * y - 1
        z = -b + (b * b - 1) ** 0.5
        inside.append(z if abs(z) < 1 else 1 / z)
    real = [[z] for z in inside if abs(z.imag) < 1e-9]
    pairs = [[z, z.conjugate()] for z in inside if z.imag >= 1e-9]
    return sorted(real + pairs, key=lambda group: group[0].real)


def _times(p: Tensor, c: complex) -> Tensor:
    """p(z) (1 + c z)."""
    return F.pad(p, (0, 1)) + c * F.pad(p, (1, 0))
