# SPDX-License-Identifier: Apache-2.0
"""|| W + s B A || of each row against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastadapt.errors import KernelError
from fastadapt.ops import dispatch
from fastadapt.ops.bits import Dense
from fastadapt.ops.row_norm import row_norm
from fastadapt.testing import (
    LowRankCase,
    adapted,
    as_float64,
    base_layer,
    check,
    config_of,
    decoded,
    in_float64,
    layer_input,
    merged,
    moved,
)

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


@pytest.mark.parametrize("left", [1.0, 1e-1, 1e-3, 0.0])
@pytest.mark.parametrize("bits", ["dense", "nf4"])
def test_row_norm_where_w_and_the_update_cancel(
    bits: str, left: float, implementation: str, device: str
) -> None:
    """B A = (left - 1) W to the rounding of B A: no worse than adding the two up."""
    t = LowRankCase(bits=bits, n=24, k=192, r=24).make(device=device)
    assert t.bits is not None
    w = decoded(moved(t.bits, "cpu")).to(device)
    a, b = w.clone(), (left - 1) * torch.eye(24, device=device)
    a[3:] += torch.randn(21, 192, generator=torch.Generator().manual_seed(1)).to(device)
    exact = torch.linalg.vector_norm(w.double() + b.double() @ a.double(), dim=1)
    with dispatch.use(implementation):
        got = row_norm(t.bits, a, b, 1.0)
    # each element of W + s B A is off by a rounding of each of its two terms, the sum of their
    # squares by sqrt(k) in the mean; the factored sum by kappa^2 / 2 <= 4 of that
    sizes = w.double().norm(dim=1) + (b.double() @ a.double()).norm(dim=1)
    assert got.isfinite().all()
    assert ((got - exact).abs() <= 8 * torch.finfo(F32).eps * sizes).all()


def test_row_norm_of_a_row_of_zeros_is_zero(implementation: str, device: str) -> None:
    w, a, b = torch.randn(4, 16), torch.randn(2, 16), torch.randn(4, 2)
    w[1], b[1] = 0, 0
    with dispatch.use(implementation):
        norm = row_norm(Dense(w.to(device)), a.to(device), b.to(device), 0.5)
    assert norm[1] == 0
    assert norm.isfinite().all()


@pytest.mark.parametrize("change", ["data", "in place", "load", "swap", "merge and unmerge"])
def test_the_norm_is_that_of_the_weight_as_it_is_now(change: str) -> None:
    """Nothing of W is kept from one call to the next: an edit through ``.data`` leaves no trace."""
    layer = adapted(base_layer("dense32", "linear"), config_of("dora"))
    held, x = layer.base_layer, layer_input("dense32", "linear", 5)
    before = layer(x)
    new = held.weight.detach() * 2 + 1
    if change == "data":
        held.weight.data.copy_(new)
    elif change == "in place":
        with torch.no_grad():
            held.weight.copy_(new)
    elif change == "load":
        held.load_state_dict({"weight": new}, strict=False)
    elif change == "swap":
        held.weight = torch.nn.Parameter(new, requires_grad=False)
    else:
        layer.merge()
        layer.unmerge()
        assert torch.equal(layer(x), before)
        return
    with torch.no_grad():
        with in_float64(layer):
            w, bias = merged(layer, ["a0"])
        got = layer(x).double()
    # a float32 product of 64 terms
    torch.testing.assert_close(got, x.double() @ w.t() + bias, rtol=1e-5, atol=1e-5)
    assert not torch.equal(got, before.double())
