# SPDX-License-Identifier: Apache-2.0
"""Methods whose update has no cheaper form than a weight: W' = W + U(W), made anew in each step.

In float32 over a plain layer x meets W' in one product; in half precision, and over layers that
must be called, U is applied beside the base, since W + U would round small updates away. Backward
makes U again instead of keeping it: what stays in memory is x. The gradient of U is a product of
the size of W, so that a step costs three such products, where LoRA's costs two.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.ops.precision import compute_dtype


class DenseAdapter(Adapter):
    """dropout: the part that holds the dropout on U's input, "" for none."""

    dropout: ClassVar[str] = ""

    def update(self, w: Tensor) -> Tensor:
        """U(W), for W in the dtype that is wanted."""
        raise NotImplementedError

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w = self._wide(w)
        return w + self.update(w), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        p = self.rate(self.dropout) if self.dropout else 0.0
        exact = x.dtype in (torch.float32, torch.float64) and compute_dtype(x) == x.dtype
        if p == 0 and exact and base.whole:
            bias = base.bias
            y = _again(lambda t: base.apply(t, self.merged(base.read()[0], None)[0]), x)
            return y if bias is None else y + base.channels(bias)
        y = base(x)
        work = compute_dtype(x) if x.is_floating_point() else y.dtype

        def extra(t: Tensor) -> Tensor:
            return base.apply(t, self.update(self._wide(base.read()[0])).to(work))

        x = base.drop(x, p)
        return y + _again(extra, x.to(work) if x.is_floating_point() else x).to(y.dtype)

    def _wide(self, w: Tensor) -> Tensor:
        first = next(t for t in self._layer_parts() if isinstance(t, Tensor))
        return w.to(torch.promote_types(w.dtype, first.dtype))

    def _layer_parts(self) -> list[Any]:
        if self._layer is None:
            return list(self.parts.values())
        return list(self._layer.parts_of(self._key).values())


def _again(function: Any, x: Tensor) -> Tensor:
    """function(x), whose insides are computed again in backward."""
    if not torch.is_grad_enabled():
        return function(x)  # type: ignore[no-any-return]
    y: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return y
