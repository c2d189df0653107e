# SPDX-License-Identifier: Apache-2.0
"""The low-rank op of a case, by this library and by hand, run forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastadapt.ops.dropout import draw_seed
from fastadapt.ops.low_rank import low_rank
from fastadapt.testing import LowRankCase, LowRankInputs, drop_factors, plain_low_rank

NAMES = ("x", "a", "b", "bias")
Low = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def ours(case: LowRankCase, t: LowRankInputs, dtype: torch.dtype | None = None) -> Low:
    dtype = dtype or case.dtype

    def op(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        return low_rank(
            x, a, b, case.scale, bits=t.bits, bias=bias, p=case.p,
            compute=case.compute or dtype, out=dtype,
        )  # fmt: skip

    return op


def by_hand(
    case: LowRankCase, t: LowRankInputs, drop: Tensor | None, dtype: torch.dtype | None
) -> Low:
    """Plain PyTorch, in ``dtype`` throughout, or in the case's own when it is None."""
    w = t.w if t.w is None else t.w.to(dtype or t.w.dtype)
    compute = dtype or case.compute

    def op(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        return plain_low_rank(x, w, a, b, bias, case.scale, drop, compute)

    return op


def run(
    op: Low, t: LowRankInputs, dtype: torch.dtype | None, wanted: tuple[str, ...] = NAMES,
    g: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """y and the gradients of ``wanted``, from leaves in ``dtype`` (None: as they are)."""
    leaves: dict[str, Tensor | None] = {}
    for name in NAMES:
        value = getattr(t, name)
        if value is not None:
            value = (value if dtype is None else value.to(dtype)).detach()
            value.requires_grad_(name in wanted)
        leaves[name] = value
    y = op(*leaves.values())  # type: ignore[arg-type]
    if wanted:
        y.backward((t.g if g is None else g).to(y.dtype))
    grads = {k: v.grad for k, v in leaves.items() if v is not None and v.grad is not None}
    return {"y": y.detach(), **grads}


def drop_of(case: LowRankCase, t: LowRankInputs) -> Tensor | None:
    """The factors of the mask that the next call after manual_seed(0) draws."""
    torch.manual_seed(0)
    return drop_factors(draw_seed(t.x.device), t.x.shape, case.p) if case.p else None
