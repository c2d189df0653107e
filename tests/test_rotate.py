# SPDX-License-Identifier: Apache-2.0
"""Block-diagonal products against the whole matrix."""

from __future__ import annotations

import torch

from fastadapt.ops.rotate import rotate

F64 = torch.float64


def test_rotate_is_the_block_diagonal_product_and_its_gradients() -> None:
    x = torch.randn(3, 24, dtype=F64, requires_grad=True)
    d = torch.randn(2, 4, 4, dtype=F64, requires_grad=True)
    whole = torch.block_diag(*(torch.eye(4, dtype=F64) + d).repeat(3, 1, 1))
    exact = x @ whole
    assert ((rotate(x, d) - exact).abs() <= 25 * 2**-53 * (x.abs() @ whole.abs())).all()
    assert torch.autograd.gradcheck(rotate, (x, d))
