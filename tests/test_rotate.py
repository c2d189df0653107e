# SPDX-License-Identifier: Apache-2.0
"""Block-diagonal products and reflections against the whole matrix."""

from __future__ import annotations

import pytest
import torch

from fastadapt.errors import KernelError
from fastadapt.ops.reflect import reflect
from fastadapt.ops.rotate import cayley, rotate

F64 = torch.float64


@pytest.mark.parametrize("apart", [1, 3])
def test_rotate_is_the_block_diagonal_product_and_its_gradients(apart: int) -> None:
    """Apart, block 1 of a segment of 3 x 4 channels takes its channels 2, 3, 8 and 9."""
    x = torch.randn(3, 24, dtype=F64, requires_grad=True)
    d = torch.randn(2, 4, 4, dtype=F64, requires_grad=True)
    runs = torch.arange(24).view(-1, 2, apart, 2).transpose(1, 2).flatten()
    assert apart == 1 or runs[4:8].tolist() == [2, 3, 8, 9]
    order = torch.eye(24, dtype=F64)[runs]
    whole = order.t() @ torch.block_diag(*(torch.eye(4, dtype=F64) + d).repeat(3, 1, 1)) @ order
    exact = x @ whole
    assert ((rotate(x, d, apart) - exact).abs() <= 25 * 2**-53 * (x.abs() @ whole.abs())).all()
    assert torch.autograd.gradcheck(lambda x, d: rotate(x, d, apart), (x, d))


@pytest.mark.parametrize(
    ("shape", "apart", "reason"),
    [((2, 3, 4), 1, "got"), ((2, 4, 4), 1, "multiple of g s"), ((3, 4, 4), 0, "apart"),
     ((4, 3, 3), 2, "even"), ((3, 4, 4), 5, "multiple of apart s")],
)  # fmt: skip
def test_blocks_that_do_not_fill_the_channels_are_refused(
    shape: tuple[int, ...], apart: int, reason: str
) -> None:
    with pytest.raises(KernelError, match=reason):
        rotate(torch.zeros(2, 12), torch.zeros(shape), apart)


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


def test_reflect_is_the_chain_of_reflections_and_its_gradients() -> None:
    x = torch.randn(2, 5, 12, dtype=F64, requires_grad=True)
    a = torch.randn(3, 12, dtype=F64, requires_grad=True)
    b = torch.randn(12, 3, dtype=F64, requires_grad=True)
    whole = torch.eye(12, dtype=F64) - a.t() @ b.t()
    off = (reflect(x, a, b) - x @ whole).abs()
    assert (off <= 17 * 2**-53 * (x.abs() @ (torch.eye(12) + a.abs().t() @ b.abs().t()))).all()
    assert torch.autograd.gradcheck(reflect, (x, a, b))


def test_the_result_may_be_changed_in_place() -> None:
    x = torch.randn(2, 5, 12, requires_grad=True)
    a, b, d = torch.randn(3, 12), torch.randn(12, 3), torch.randn(3, 4, 4)
    for y in (reflect(x, a, b), rotate(x, d), rotate(x, d, 3)):
        y.mul_(2).sum().backward()
    assert x.grad is not None


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KernelError, match=r"expected a .r, k=12. and b .k=12, r."):
        reflect(torch.zeros(2, 12), torch.zeros(3, 12), torch.zeros(3, 12))
