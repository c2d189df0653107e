# SPDX-License-Identifier: Apache-2.0
"""Gradients that methods write out by hand, against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.methods.c3a import CirculantFunction
from fastadapt.methods.fourierft import InverseFunction
from fastadapt.methods.projection import ScaledFunction, projected
from fastadapt.methods.road import TurnFunction
from fastadapt.ops.reweight import reweight
from fastadapt.ops.rotate import cayley

G = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=G).requires_grad_()


def _reweighted(x: Tensor, p: Tensor, bias: Tensor) -> Tensor:
    w = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
    return reweight(x, lambda: w, lambda: w * p.exp(), lambda: [p], bias)


PLACES = torch.tensor([[0, 3, 4, 2, 1, 0], [0, 1, 5, 3, 3, 0]])
A = numbers(7, 6).detach()
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "circulant": (CirculantFunction.apply, (numbers(2, 3, 4),)),
    "fourier-odd": (InverseFunction.apply, (numbers(6), PLACES, 5, 7)),
    "fourier-even": (InverseFunction.apply, (numbers(6), PLACES, 6, 6)),
    "turn": (TurnFunction.apply, (numbers(3, 8), numbers(8), numbers(8), 4, 1)),
    "turn-images": (TurnFunction.apply, (numbers(2, 8, 3), numbers(8), numbers(8), 4, 1)),
    "scaled": (ScaledFunction.apply, (numbers(5, 3), numbers(3), numbers(4), A[:4, :3], None)),
    "scaled-noise": (
        ScaledFunction.apply,
        (numbers(2, 5, 6), numbers(6), numbers(4), A[:4, :3], A[:5, :3].expand(2, 5, 3)),
    ),
    "projected": (lambda x: projected(x * 2, A, 3, torch.float64), (numbers(2, 4),)),
    "cayley": (lambda q: cayley(q - q.mT), (numbers(2, 4, 4),)),
    "reweight": (_reweighted, (numbers(2, 3, 4), numbers(5, 4), numbers(5))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_is_that_of_its_function(case: str) -> None:
    function, inputs = CASES[case]
    assert torch.autograd.gradcheck(function, inputs)


def test_an_inverse_transform_is_the_real_part_of_the_whole_one() -> None:
    for out, inner in ((5, 7), (6, 6), (5, 6), (6, 1)):
        kept = (PLACES[0] < out) & (PLACES[1] < inner)
        places, spectrum = PLACES[:, kept], numbers(6).detach()[kept]
        s = torch.zeros(out, inner, dtype=torch.float64)
        s.index_put_((places[0], places[1]), spectrum, accumulate=True)
        found = InverseFunction.apply(spectrum, places, out, inner)
        assert (found - torch.fft.ifft2(s).real).abs().max() < 8 * 2**-53


def test_layers_that_get_the_same_input_share_one_product() -> None:
    """Until the input or the projection is another, or changed; each may go backward alone."""
    x = numbers(3, 6) * 1
    first = projected(x, A, 4, torch.float64)
    assert projected(x, A, 4, torch.float64) is first
    assert projected(x, A, 3, torch.float64) is not first
    assert projected(x * 1, A, 4, torch.float64) is not first
    first = projected(x, A, 4, torch.float64)
    with torch.no_grad():
        assert projected(x, A, 4, torch.float64) is not first
        x.add_(1)
    assert projected(x, A, 4, torch.float64) is not first
    leaf = numbers(3, 6)
    for _ in range(2):
        projected(leaf * 1, A, 4, torch.float64).sum().backward(retain_graph=False)
    middle = leaf.detach() * 1
    middle.requires_grad_()
    twice = middle.tanh()
    one, two = (projected(twice, A, 4, torch.float64) for _ in range(2))
    one.sum().backward(retain_graph=True)
    two.sum().backward()
