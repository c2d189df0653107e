# SPDX-License-Identifier: Apache-2.0
"""|| W + s B A || of each row against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastadapt.errors import KernelError
from fastadapt.ops import dispatch
from fastadapt.ops.row_norm import row_norm
from fastadapt.testing import LowRankCase, as_float64, check, decoded, moved

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("bits", ["dense", "nf4", "nf4-flat", "fp4"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("sizes", [{}, {"n": 1, "r": 1}, {"n": 33, "k": 192, "r": 5}], ids=str)
def test_row_norm(
    sizes: dict[str, int], dtype: torch.dtype, bits: str, implementation: str, device: str
) -> None:
    t = LowRankCase(bits=bits, dtype=dtype, pair=torch.promote_types(dtype, F32), **sizes).make(
        device=device
    )
    assert t.bits is not None
    if bits == "dense" and dtype == F64 and implementation != "reference":
        with dispatch.use(implementation), pytest.raises(KernelError, match="float64"):
            row_norm(t.bits, t.a, t.b, 1.7)
        return
    held = decoded(moved(t.bits, "cpu")).to(device)
    wide = torch.promote_types(held.dtype, F32)

    def by(kind: torch.dtype) -> Tensor:
        w = held.to(kind) + 1.7 * (t.b.to(kind) @ t.a.to(kind))
        return torch.linalg.vector_norm(w, dim=1)

    with dispatch.use(implementation):
        got = row_norm(t.bits, t.a.requires_grad_(), t.b, 1.7)
    assert not got.requires_grad
    plain = by(F32) if wide == F32 else as_float64(by(F32), by(F64))
    check(got, plain, by(F64), what="norm")
