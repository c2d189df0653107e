# SPDX-License-Identifier: Apache-2.0
"""The error budget: an op may err against float64 by twice what plain PyTorch errs in the same
dtype, plus one rounding of the largest value. It is computed for each case; no tolerance is typed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error(got: Tensor, oracle: Tensor) -> float:
    """max |got - oracle|, in float64; NaN where ``got`` has one."""
    if oracle.numel() == 0:
        return 0.0
    return (got.detach().double() - oracle.detach()).abs().max().item()


def budget(plain: Tensor, oracle: Tensor, cost: float = 0.0) -> float:
    """2 x (the error of ``plain`` + cost) + one rounding, in plain's dtype, of the largest value.

    cost: what rounding the inputs once does to the value, where that was measured as well."""
    if oracle.numel() == 0:
        return 0.0
    unit = torch.finfo(plain.dtype).eps / 2
    return 2 * (error(plain, oracle) + cost) + unit * oracle.detach().abs().max().item()


def check(
    got: Tensor, plain: Tensor, oracle: Tensor, *, cost: float = 0.0, what: str = "value"
) -> None:
    """Raise AssertionError where ``got`` differs from ``plain`` in shape or dtype, or from the
    float64 ``oracle`` by more than the budget."""
    if (got.shape, got.dtype) != (plain.shape, plain.dtype):
        raise AssertionError(
            f"{what}: expected {tuple(plain.shape)} {plain.dtype}, "
            f"got {tuple(got.shape)} {got.dtype}"
        )
    off, allowed = error(got, oracle), budget(plain, oracle, cost)
    if not off <= allowed:
        raise AssertionError(f"{what}: expected an error of at most {allowed:.3g}, got {off:.3g}")


def as_float64(plain: Tensor, oracle: Tensor) -> Tensor:
    """A stand-in for plain PyTorch in float64, which is the oracle itself: the error of ``plain``,
    a float32 result, by the ratio of the roundings, and half again because the oracle errs too."""
    ratio = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return oracle.detach() + (plain.detach().double() - oracle.detach()) * ratio
