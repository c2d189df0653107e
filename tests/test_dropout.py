# SPDX-License-Identifier: Apache-2.0
"""Dropout from a seed: its definition, its masks, its gradient."""

from __future__ import annotations

import pytest
import torch

from fastadapt.errors import KernelError
from fastadapt.ops import dispatch
from fastadapt.ops.dropout import DropoutFunction, dropout, keep_mask, threshold
from fastadapt.testing import drop_factors

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 9), (3, 5, 17)], ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_dropout_is_its_definition_and_so_is_its_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, implementation: str, device: str
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    g = torch.randn_like(x)
    seed = torch.tensor([-77], device=device)
    with dispatch.use(implementation):
        leaf = x.clone().requires_grad_()
        y = dropout(leaf, 0.3, seed)
        y.backward(g)
    for value, source in ((y, x), (leaf.grad, g)):
        # the factor is applied in float32 at least, and the product rounded once
        wide = torch.promote_types(dtype, F32)
        factors = drop_factors(seed, shape, 0.3).to(wide)
        assert torch.equal(value, (source.to(wide) * factors).to(dtype))


def test_dropout_of_a_strided_x_and_a_strided_gradient(implementation: str, device: str) -> None:
    x = torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(6)).to(device)
    seed = torch.tensor([8], device=device)
    with dispatch.use(implementation):
        views = [x.permute(2, 0, 1)[:, ::2].detach().requires_grad_() for _ in range(2)]
        views[1] = views[1].detach().contiguous().requires_grad_()
        for view in views:
            dropout(view, 0.4, seed).backward(torch.ones_like(view))
        with torch.no_grad():
            assert torch.equal(dropout(views[0], 0.4, seed), dropout(views[1], 0.4, seed))
    assert torch.equal(views[0].grad, views[1].grad)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_keeps_the_share_it_promises(p: float, implementation: str, device: str) -> None:
    numel = 100_000
    with dispatch.use(implementation):
        kept = dropout(torch.ones(numel, device=device), p, torch.tensor([9], device=device)) != 0
    share = 1 - threshold(p) / 65536
    # six standard deviations of a binomial share
    assert abs(kept.double().mean().item() - share) < 6 * (share * (1 - share) / numel) ** 0.5


def test_dropout_masks_follow_the_seed(implementation: str, device: str) -> None:
    x = torch.ones(4096, device=device)
    with dispatch.use(implementation):
        torch.manual_seed(1)
        first, second = dropout(x, 0.5), dropout(x, 0.5)
        torch.manual_seed(1)
        again = dropout(x, 0.5)
    assert torch.equal(first, again)
    both = ((first != 0) & (second != 0)).double().mean().item()
    # independent masks agree on a quarter: six standard deviations
    assert abs(both - 0.25) < 6 * (0.25 * 0.75 / 4096) ** 0.5


def test_dropout_of_nothing_and_of_everything() -> None:
    x = torch.randn(5)
    assert dropout(x, 0.0) is x
    for p in (1.0, 1.5, -0.5, float("nan")):
        with pytest.raises(KernelError, match="expected 0 <= p < 1"):
            dropout(x, p)


def test_dropout_gradcheck() -> None:
    x = torch.randn(4, 5, dtype=F64, requires_grad=True)
    seed = torch.tensor([11])
    assert keep_mask(seed, 20, 0.3).unique().numel() == 2
    with dispatch.use("reference"):
        assert torch.autograd.gradcheck(lambda x: DropoutFunction.apply(x, seed, 0.3), x)
