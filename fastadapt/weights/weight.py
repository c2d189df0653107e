# SPDX-License-Identifier: Apache-2.0
"""What a weight format answers, in the orientation that the layer stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.ops.bits import Bits
from fastadapt.ops.precision import compute_dtype


class Weight(ABC):
    """The weight of one layer."""

    name: ClassVar[str]
    quantised: ClassVar[bool] = True

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer

    @classmethod
    @abstractmethod
    def claims(cls, layer: nn.Module) -> bool: ...

    @abstractmethod
    def read(self) -> Tensor:
        """The weight, dequantised."""

    @abstractmethod
    def write(self, w: Tensor) -> None:
        """Store ``w`` in new tensors, requantised; the old ones are left as they are."""

    def refit(self, w: Tensor) -> None:
        """Like ``write``, but with codes that keep what ``w`` changes, at more error elsewhere; the
        same as ``write`` for a format without codes."""
        self.write(w)

    def in_16_bit(self, w: Tensor, bias: Tensor | None) -> nn.Module | None:
        """A layer with ``w`` unquantised, to stand in this one's place; None where the layer is not
        quantised."""
        return None

    def snapshot(self) -> tuple[Any, ...]:
        """The stored tensors as they are; ``write`` leaves them alone."""
        return (self.layer.weight,)

    def restore(self, held: tuple[Any, ...]) -> None:
        """Put a snapshot back, to the bit."""
        (self.layer.weight,) = held

    def bits(self) -> Bits | None:
        """What fused ops eat, or None where only the layer itself can multiply."""
        return None

    def compute(self, x: Tensor) -> torch.dtype:
        """The dtype that the product with ``x`` is asked for."""
        return compute_dtype(x)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that new adapter parameters take before any cast."""
        dtype: torch.dtype = self.layer.weight.dtype
        return dtype if dtype.is_floating_point else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        found: torch.device = self.layer.weight.device
        return found

    def attach(self) -> None:  # noqa: B027
        """Called when the model gets adapters, perhaps again; most formats prepare nothing."""

    def detach(self) -> None:  # noqa: B027
        """Called when the layer is given back: undo what ``attach`` did."""
