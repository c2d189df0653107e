# SPDX-License-Identifier: Apache-2.0
"""Methods whose update has no cheaper form than a weight: W' = W + U, made anew in each step.

Over a plain matrix x meets W' in one product (``ops.reweight``); over layers that must be called, U
is applied beside the base. Backward makes U again instead of keeping it: what stays in memory is x.
The gradient of U is a product of the size of W, so that a step costs three such products, where
LoRA's costs two.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastadapt.adapter import Adapter
from fastadapt.base import Base, Stacked
from fastadapt.ops.precision import compute_dtype
from fastadapt.ops.reweight import reweight


class DenseAdapter(Adapter):
    """dropout: the part that holds the dropout on U's input, "" for none."""

    dropout: ClassVar[str] = ""

    def update(self, w: Tensor) -> Tensor:
        """U of a W in the dtype that is wanted."""
        raise NotImplementedError

    def update_of(self, base: Base) -> Tensor:
        """U for a layer."""
        return self.update(self._wide(base.read()[0]))

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w = self._wide(w)
        return w + self.update(w).to(w.device), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if base.whole and (not self.dropout or self.rate(self.dropout) == 0):
            return reweight(
                x, lambda: base.read()[0], lambda: self.update_of(base), self._trained, base.bias
            )
        y = base(x)
        return y + self.beside(x, base, y.dtype)

    def beside(self, x: Tensor, base: Base, dtype: torch.dtype) -> Tensor:
        """U applied to the dropped x, in ``dtype``."""
        x = base.drop(x, self.rate(self.dropout) if self.dropout else 0.0)
        work = compute_dtype(x) if x.is_floating_point() else dtype
        if len(base.shape) == 2 and not base.indexed and not self._leans(base):
            update = reweight(x.to(work), None, lambda: self.update_of(base), self._trained)
            return update.to(dtype)

        def extra(t: Tensor) -> Tensor:
            return base.apply(t, self.update_of(base).to(work))

        return again(extra, x.to(work) if x.is_floating_point() else x).to(dtype)

    def _leans(self, base: Base) -> bool:
        """U is made of what adapters below have learnt, and has a gradient for them."""
        return isinstance(base, Stacked)

    def _wide(self, w: Tensor) -> Tensor:
        return w.to(torch.promote_types(w.dtype, self._trained()[0].dtype))

    def _trained(self) -> list[Tensor]:
        parts: dict[str, Any] = self.parts
        if self._layer is not None:
            parts = self._layer.parts_of(self._key)
        own = [p for name, p in parts.items() if name not in self.constant]
        return [t for p in own for t in (p.parameters() if isinstance(p, nn.Module) else (p,))]


class DenseDelta(DenseAdapter):
    """U depends on no W."""

    converts = True

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """U for a weight of this shape."""
        raise NotImplementedError

    def update(self, w: Tensor) -> Tensor:
        return self.delta(tuple(w.shape))

    def update_of(self, base: Base) -> Tensor:
        return self.delta(base.shape)

    def _leans(self, base: Base) -> bool:
        return False


def again(function: Any, x: Tensor) -> Tensor:
    """function(x), whose insides are computed again in backward."""
    if not torch.is_grad_enabled():
        return function(x)  # type: ignore[no-any-return]
    y: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return y
