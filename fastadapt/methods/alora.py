# SPDX-License-Identifier: Apache-2.0
"""Activated LoRA:  y_t = W x_t + s B A x_t  from the invocation tokens of the row on, W x_t before.

What stands before the invocation is the base's, keys and values included, so that a cache of the
base model serves the adapter. It is no map of the form W': it cannot be merged.
Source: Activated LoRA (arXiv 2504.12397).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.base import Base
from fastadapt.errors import LifecycleError, UnsupportedError
from fastadapt.methods.lora import Lora, refuse_kind
from fastadapt.ops.low_rank import low_rank
from fastadapt.ops.precision import compute_dtype


class ALora(Lora):
    name = "alora"

    def build(self, base: Base, shared: Any) -> None:
        refuse_kind(base, "alora_invocation_tokens", indexed=False)
        super().build(base, shared)

    def invocation(self) -> list[int] | None:
        tokens: list[int] | None = self.config.alora_invocation_tokens
        return tokens

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise UnsupportedError(
            "aLoRA does not support merging: it cannot be merged, since the same weight serves the "
            "tokens before its invocation without it"
        )

    def forward(self, x: Tensor, base: Base) -> Tensor:
        offsets = self.offsets()
        rows = len(offsets)
        length, left = divmod(x.shape[:-1].numel(), max(rows, 1))
        if left:
            raise LifecycleError(
                f"expected offsets of aLoRA for each row of the batch, got {rows} for an input of "
                f"shape {tuple(x.shape)}"
            )
        active = [min(o or 0, length) for o in offsets]
        if rows and min(active) == length:
            return super().forward(x, base)
        y = base(x)
        # without an active token the parameters still get their gradient, of zeros
        ends = [
            torch.arange((i + 1) * length - count, (i + 1) * length)
            for i, count in enumerate(active)
        ]
        index = torch.cat([torch.empty(0, dtype=torch.long), *ends]).to(x.device)
        chosen = x.reshape(-1, x.shape[-1]).index_select(0, index)
        a, b, kind = *self.pair(), compute_dtype(x)
        p = self.rate("lora_dropout")
        more = low_rank(chosen, a, b, self["scaling"], p=p, compute=kind, out=kind)
        extra = self._bias()
        if extra is not None:
            more = more + extra.to(more.dtype)
        flat = y.reshape(-1, y.shape[-1])
        return flat.index_add(0, index, more.to(y.dtype)).view(y.shape)
