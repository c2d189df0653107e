# SPDX-License-Identifier: Apache-2.0
"""y = v x + shift + rest for each channel: values and gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt.errors import KernelError
from fastadapt.ops import dispatch
from fastadapt.ops.scale import scale
from fastadapt.testing import as_float64, check

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [((0, 5), -1), ((1, 1), -1), ((3, 17, 33), -1), ((257, 5), 1), ((2, 7, 3, 5), 1)]


def inputs(shape: tuple[int, ...], axis: int, dtype: torch.dtype, full: bool) -> list[Any]:
    """x, v, shift, rest and the gradient that comes in; the vectors are float32."""
    g = torch.Generator().manual_seed(len(shape))
    wide = torch.promote_types(dtype, F32)
    x, rest, dy = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    v, shift = (torch.randn(shape[axis], generator=g).to(wide) for _ in range(2))
    return [x, v, shift if full else None, rest if full else None, dy]


def outcome(op: Any, values: list[Any], dtype: torch.dtype | None) -> list[Tensor]:
    leaves = [None if t is None else t if dtype is None else t.to(dtype) for t in values]
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    y = op(*leaves[:4])
    wanted = [t for t in leaves[:4] if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, leaves[4].detach())]


@pytest.mark.parametrize("full", [False, True], ids=["v", "v-shift-rest"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_scale_and_its_gradients(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, full: bool, implementation: str,
    device: str,
) -> None:  # fmt: skip
    if implementation == "triton" and dtype == F64:
        return
    values = [t if t is None else t.to(device) for t in inputs(shape, axis, dtype, full)]
    column = (-1, *(1,) * (len(shape) - 1 - axis % len(shape)))

    def by_hand(x: Tensor, v: Tensor, shift: Any, rest: Any) -> Tensor:
        y = x * v.view(column)
        y = y if shift is None else y + shift.view(column)
        return (y if rest is None else y + rest).to(x.dtype)

    def ours(x: Tensor, v: Tensor, shift: Any, rest: Any) -> Tensor:
        return scale(x, v, axis=axis, shift=shift, rest=rest)

    oracle = outcome(by_hand, values, F64)
    plain = outcome(by_hand, values, F32 if dtype == F64 else None)
    if dtype == F64:
        plain = [as_float64(p, o) for p, o in zip(plain, oracle, strict=True)]
    chosen = "reference" if implementation == "native" else implementation
    with dispatch.use(chosen):
        got = outcome(ours, values, None)
    for name, *three in zip(("y", "dx", "dv", "dshift", "drest"), got, plain, oracle, strict=False):
        check(three[0], three[1], three[2], what=name)


def test_scale_gradcheck() -> None:
    x, v, shift, rest = (t.to(F64).requires_grad_() for t in inputs((2, 3, 4), 1, F64, True)[:4])
    assert torch.autograd.gradcheck(
        lambda x, v, shift, rest: scale(x, v, axis=1, shift=shift, rest=rest), (x, v, shift, rest)
    )


def test_scale_saves_x_only_where_v_is_trained() -> None:
    seen: list[tuple[int, ...]] = []
    x, v = torch.randn(4, 3, requires_grad=True), torch.randn(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, id):
        scale(x, v)
        assert seen == [(3,)]
        scale(x, v.requires_grad_())
    assert seen == [(3,), (4, 3), (3,)]


def test_an_output_that_is_changed_in_place_still_has_its_gradients() -> None:
    x, v = torch.randn(4, 3), torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    y = scale(x, v)
    y.mul_(2)
    y.sum().backward()
    torch.testing.assert_close(v.grad, 2 * x.sum(0))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_scale_compiles_without_a_graph_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(scale, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        x, v, _, _, g = inputs((rows, 6), -1, F32, False)
        want = outcome(lambda x, v, *_: scale(x, v), [x, v, None, None, g], None)
        got = outcome(lambda x, v, *_: compiled(x, v), [x, v, None, None, g], None)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_scale_of_a_strided_x_under_checkpointing(reentrant: bool) -> None:
    x = torch.randn(6, 4).t().requires_grad_()
    v = torch.randn(6, requires_grad=True)
    want = torch.autograd.grad(scale(x, v).square().sum(), (x, v))
    y = checkpoint(scale, x, v, use_reentrant=reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, want[0])
    assert torch.equal(v.grad, want[1])


@pytest.mark.parametrize(
    "changes", [{"v": torch.zeros(4)}, {"shift": torch.zeros(1)}, {"rest": torch.zeros(1, 3)}],
    ids=["v", "shift", "rest"],
)  # fmt: skip
def test_scale_refuses_what_does_not_fit(changes: dict[str, Any]) -> None:
    with pytest.raises(KernelError, match="scale: expected"):
        scale(torch.zeros(2, 3), **{"v": torch.zeros(3), **changes})
