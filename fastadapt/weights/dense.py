# SPDX-License-Identifier: Apache-2.0
"""A plain floating-point weight; also a parameter of another name, of any module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.errors import UnsupportedError
from fastadapt.ops.bits import Bits, Dense
from fastadapt.weights.weight import Weight


class DenseWeight(Weight):
    name = "dense"
    quantised = False

    @classmethod
    def claims(cls, layer: nn.Module) -> bool:
        weight = getattr(layer, "weight", None)
        return isinstance(weight, Tensor) and weight.is_floating_point()

    def read(self) -> Tensor:
        return self.layer.weight.detach()  # type: ignore[no-any-return]

    def write(self, w: Tensor) -> None:
        old = self.layer.weight
        # a new Parameter, so that a tied layer keeps its own weight
        data = w.to(old.dtype).contiguous().clone()
        self.layer.weight = nn.Parameter(data, requires_grad=old.requires_grad)

    def bits(self) -> Bits | None:
        return Dense(self.layer.weight)


class DenseParameter(DenseWeight):
    """The parameter called ``key``, which may be parametrised (``torch.nn.utils.parametrize``)."""

    def __init__(self, layer: nn.Module, key: str) -> None:
        super().__init__(layer)
        self.key = key

    @property
    def value(self) -> Tensor:
        steps = getattr(self.layer, "parametrizations", {})
        # the steps themselves, not what a cache of parametrize may hold
        held: Tensor = steps[self.key]() if self.key in steps else getattr(self.layer, self.key)
        return held

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.value.dtype
        # nothing is added or multiplied in 8 bits
        wide = dtype.is_floating_point and dtype.itemsize > 1
        return dtype if wide else torch.get_default_dtype()

    @property
    def parametrised(self) -> bool:
        return self.key in getattr(self.layer, "parametrizations", {})

    def read(self) -> Tensor:
        """With its gradient, when somebody trains it."""
        return self.value

    def write(self, w: Tensor) -> None:
        if self.parametrised:
            raise UnsupportedError(
                f"{self.key} of {type(self.layer).__name__} is parametrised: there is no tensor "
                "that a merged weight could be written to"
            )
        old = self.value
        data = w.detach().to(old.dtype).contiguous().clone()
        setattr(self.layer, self.key, nn.Parameter(data, requires_grad=old.requires_grad))

    def snapshot(self) -> tuple[Any, ...]:
        return (self.value,)

    def restore(self, held: tuple[Any, ...]) -> None:
        setattr(self.layer, self.key, held[0])

    def bits(self) -> Bits | None:
        return Dense(self.value)
