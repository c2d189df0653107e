# SPDX-License-Identifier: Apache-2.0
"""What a layer kind answers. Weights are (out, in, *kernel), whatever the layer stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


class Kind(ABC):
    """One layer of this kind.

    name:    shown by ``explain``
    product: the op is x W^T + bias, so that a fused op may serve it
    indexed: the input holds indices of input channels, not values (an embedding)
    """

    name: ClassVar[str]
    product: ClassVar[bool] = False
    indexed: ClassVar[bool] = False

    @property
    def groups(self) -> int:
        """The input has ``shape[1] * groups`` channels; a group of outputs sees its own part."""
        return 1

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer

    @classmethod
    @abstractmethod
    def claims(cls, layer: nn.Module) -> bool: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""

    @property
    def stock_forward(self) -> bool:
        """The layer's class computes what ``apply`` computes, and nothing more."""
        return False

    def orient(self, w: Tensor) -> Tensor:
        """Stored orientation to (out, in, *kernel), or back (its own inverse)."""
        return w

    @abstractmethod
    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        """This layer's op with the weight ``w``, without bias."""

    @abstractmethod
    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        """The channels of h, an output of ``apply``, mapped by w: (out, r)."""

    def channels(self, v: Tensor) -> Tensor:
        """v: (out,) shaped to scale or shift the output."""
        return v

    def inputs(self, v: Tensor) -> Tensor:
        """v: (channels of the input,) shaped to scale the input."""
        return v

    @abstractmethod
    def pair(self, r: int, bias: bool) -> tuple[nn.Module | nn.Parameter, nn.Module | nn.Parameter]:
        """Two freshly initialised maps, in -> r and r -> out, as PEFT makes them (same draws from
        the generator)."""
