# SPDX-License-Identifier: Apache-2.0
"""A parameter of any module, which the module's own forward uses as it likes (experts, routers).

W is (out, in), or (experts, out, in) for a stack of matrices. Modules store a stack so, or, where
they say ``is_transposed``, as (experts, in, out).
"""

from __future__ import annotations

from torch import Tensor, nn

from fastadapt.errors import UnsupportedError
from fastadapt.kinds.kind import Kind


class Parameter(Kind):
    name = "parameter"

    def __init__(self, layer: nn.Module, parameter: str = "weight") -> None:
        super().__init__(layer)
        held = getattr(layer, parameter)
        self._stored = tuple(getattr(held, "ds_shape", held.shape))
        if len(self._stored) not in (2, 3):
            raise UnsupportedError(
                f"lora.ParamWrapper was initialized with {len(self._stored)} dimensional "
                f"Parameter, but only 2d and 3d are supported: {parameter} of "
                f"{type(layer).__name__}."
            )
        self._transposed = len(self._stored) == 3 and getattr(layer, "is_transposed", False)

    @classmethod
    def claims(cls, layer: nn.Module) -> bool:
        """None: a parameter is asked for by its name."""
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        *experts, n, k = self._stored
        return (*experts, k, n) if self._transposed else self._stored

    def orient(self, w: Tensor) -> Tensor:
        return w.transpose(-1, -2) if self._transposed else w

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        raise UnsupportedError("what a module does with its parameter is the module's own affair")

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        raise UnsupportedError("a parameter has no output whose channels could be mixed")

    def pair(self, r: int, bias: bool) -> tuple[nn.Module, nn.Module]:
        """(experts * r, in) and (out, r * experts), as PEFT has them."""
        *experts, n, k = self.shape
        rows = r * (experts[0] if experts else 1)
        return nn.Linear(k, rows, bias=False), nn.Linear(rows, n, bias=bias)


class Attention(Parameter):
    """The input projection of nn.MultiheadAttention: W is (3 dim, dim)."""

    name = "attention"
