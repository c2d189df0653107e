# SPDX-License-Identifier: Apache-2.0
"""Block-diagonal products against the whole matrix."""

from __future__ import annotations

import pytest
import torch

from fastadapt.ops.rotate import cayley, rotate

F64 = torch.float64


def test_rotate_is_the_block_diagonal_product_and_its_gradients() -> None:
    x = torch.randn(3, 24, dtype=F64, requires_grad=True)
    d = torch.randn(2, 4, 4, dtype=F64, requires_grad=True)
    whole = torch.block_diag(*(torch.eye(4, dtype=F64) + d).repeat(3, 1, 1))
    exact = x @ whole
    assert ((rotate(x, d) - exact).abs() <= 25 * 2**-53 * (x.abs() @ whole.abs())).all()
    assert torch.autograd.gradcheck(rotate, (x, d))


def test_cayley_is_its_definition_and_the_series_turns_the_other_way() -> None:
    """R = (I - Q) (I + Q)^-1 is orthogonal; the truncated series, whose last term Q^5
    has half its weight, misses R's transpose by that half and what follows."""
    skew = torch.randn(3, 5, 5, dtype=F64, generator=torch.Generator().manual_seed(0)) / 40
    q, eye = skew - skew.mT, torch.eye(5, dtype=F64)
    exact = (eye - q) @ torch.linalg.inv(eye + q)
    turned = cayley(q) + eye
    assert (turned - exact).abs().max() < 50 * 2**-53
    assert (turned @ turned.mT - eye).abs().max() < 50 * 2**-53
    norm = float(torch.linalg.matrix_norm(q, 2).max())
    assert (cayley(q, 6) + eye - exact.mT).abs().max() < 2 * norm**5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cayley_of_half_precision_is_that_of_the_same_numbers_in_float32(
    dtype: torch.dtype,
) -> None:
    skew = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(1)) / 40
    q = (skew - skew.mT).to(dtype)
    assert torch.equal(cayley(q), cayley(q.float()))
