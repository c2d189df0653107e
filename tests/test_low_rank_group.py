# SPDX-License-Identifier: Apache-2.0
"""Layers over one x as one op: what they give one by one, and against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt.errors import KernelError
from fastadapt.ops import dispatch
from fastadapt.ops.bits import Nf4
from fastadapt.ops.dropout import draw_seed
from fastadapt.ops.low_rank import low_rank
from fastadapt.ops.low_rank_group import Member, low_rank_group
from fastadapt.ops.precision import compute_dtype
from fastadapt.testing import (
    GroupCase,
    LowRankInputs,
    as_float64,
    check,
    drop_factors,
    plain_low_rank,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("poisoned")
Leaves = dict[str, Tensor]
DROPS = ((48, 8, 0.3, True), (16, 1, 0.0, False), (33, 5, 0.5, True))
"""Two masks, and one adapter without any between them."""

CASES = [
    *(
        GroupCase(bits=bits, dtype=dtype, members=members)
        for bits, dtype, members in itertools.product(
            ("dense", "nf4"), (F64, F32, BF16, F16), (GroupCase.members, DROPS)
        )
    ),
    *(
        GroupCase(**{"bits": "nf4", **sizes})
        for sizes in (
            {"m": 0}, {"m": 1}, {"m": 1, "members": DROPS}, {"m": 3, "k": 192}, {"m": 70},
            {"m": 6, "layout": "batch", "members": DROPS}, {"layout": "strided"},
            {"layout": "transposed", "members": DROPS}, {"members": DROPS[:1]},
            {"members": ((40, 100, 0.0, True), (24, 200, 0.0, True))},
            {"dtype": BF16, "pair": F32, "members": DROPS}, {"dtype": BF16, "pair": F32},
            {"dtype": F32, "compute": BF16}, {"bits": "nf4-flat"}, {"bits": "fp4"},
        )
    ),
]  # fmt: skip


def leaves_of(x: Tensor, made: list[LowRankInputs]) -> Leaves:
    found = {"x": x}
    for i, t in enumerate(made):
        found |= {f"a{i}": t.a, f"b{i}": t.b}
        if t.bias is not None:
            found[f"bias{i}"] = t.bias
    return found


def members_of(case: GroupCase, made: list[LowRankInputs], held: Leaves) -> list[Member]:
    return [
        Member(t.bits, held.get(f"bias{i}"), held[f"a{i}"], held[f"b{i}"], c.scale, c.p)
        for i, (c, t) in enumerate(zip(case.cases(), made, strict=True))
    ]


def ours(
    case: GroupCase, made: list[LowRankInputs], dtype: torch.dtype | None = None
) -> Callable[..., tuple[Tensor, ...]]:
    dtype = dtype or case.dtype

    def op(**held: Tensor) -> tuple[Tensor, ...]:
        members = members_of(case, made, held)
        return low_rank_group(held["x"], members, compute=case.compute or dtype, out=dtype)

    return op


def one_by_one(case: GroupCase, made: list[LowRankInputs]) -> Callable[..., tuple[Tensor, ...]]:
    def op(**held: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            low_rank(
                held["x"], v.a, v.b, v.scale, bits=v.bits, bias=v.bias, p=v.p,
                compute=case.compute or case.dtype, out=case.dtype,
            )
            for v in members_of(case, made, held)
        )  # fmt: skip

    return op


def by_hand(
    case: GroupCase, made: list[LowRankInputs], dtype: torch.dtype | None
) -> Callable[..., tuple[Tensor, ...]]:
    """Plain PyTorch in ``dtype`` (None: the case's own), with the masks that the op draws after
    manual_seed(0)."""
    torch.manual_seed(0)
    x = made[0].x
    drops = [drop_factors(draw_seed(x.device), x.shape, c.p) if c.p else None for c in case.cases()]

    def op(**held: Tensor) -> tuple[Tensor, ...]:
        found = []
        for i, (c, t) in enumerate(zip(case.cases(), made, strict=True)):
            w = t.w if dtype is None or t.w is None else t.w.to(dtype)
            pair = held[f"a{i}"], held[f"b{i}"]
            found.append(
                plain_low_rank(
                    held["x"], w, *pair, held.get(f"bias{i}"), c.scale, drops[i],
                    dtype or case.compute,
                )
            )  # fmt: skip
        return tuple(found)

    return op


def run(
    op: Callable[..., tuple[Tensor, ...]], values: Leaves, made: list[LowRankInputs],
    dtype: torch.dtype | None = None, wanted: tuple[str, ...] | None = None,
    out: torch.dtype | None = None,
) -> Leaves:  # fmt: skip
    """y of each and the gradients of ``wanted`` (default: all)."""
    held = {
        k: (v if dtype is None else v.to(dtype)).detach().requires_grad_(
            wanted is None or k in wanted
        )
        for k, v in values.items()
    }  # fmt: skip
    ys = op(**held)
    torch.autograd.backward(ys, [t.g.to(out or y.dtype) for t, y in zip(made, ys, strict=True)])
    grads = {k: v.grad for k, v in held.items() if v.grad is not None}
    return {**{f"y{i}": y.detach() for i, y in enumerate(ys)}, **grads}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_group_and_its_gradients(case: GroupCase, implementation: str, device: str) -> None:
    x, made = case.make(device=device)
    values = leaves_of(x, made)
    if implementation == "triton" and case.dtype == F64:
        with dispatch.use("triton"), pytest.raises(KernelError, match="triton"):
            ours(case, made)(**values)
        return
    oracle = run(by_hand(case, made, F64), values, made, F64)
    narrow = F32 if case.dtype == F64 else None
    plain = run(by_hand(case, made, narrow), values, made, narrow)
    if case.dtype == F64:
        plain = {k: as_float64(v, oracle[k]) for k, v in plain.items()}
    torch.manual_seed(0)
    with dispatch.use(implementation):
        got = run(ours(case, made), values, made)
    assert set(got) == set(oracle)
    for name in got:
        check(got[name], plain[name], oracle[name], what=name)


@pytest.mark.parametrize("bits", ["dense", "nf4"])
def test_masks_and_outputs_are_those_of_the_layers_one_by_one(
    bits: str, implementation: str, device: str
) -> None:
    """To the bit, with dropout, and everything but dx, which has fewer roundings."""
    case = GroupCase(bits=bits, dtype=BF16, members=DROPS)
    x, made = case.make(device=device)
    with dispatch.use(implementation):
        found = []
        for op in (ours(case, made), one_by_one(case, made)):
            torch.manual_seed(5)
            found.append(run(op, leaves_of(x, made), made))
            found[-1]["next draw"] = draw_seed(x.device)
    for name in found[0].keys() - {"x"}:
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize("members", [GroupCase.members, DROPS], ids=["plain", "drops"])
@pytest.mark.parametrize(
    "wanted", [("x",), ("a1",), ("b2",), ("bias0",), ("x", "b0"), ("a0", "a2")], ids=str
)
def test_gradients_that_are_needed(
    wanted: tuple[str, ...], members: Any, implementation: str, device: str
) -> None:
    case = GroupCase(bits="nf4", members=members)
    x, made = case.make(device=device)
    with dispatch.use(implementation):
        torch.manual_seed(0)
        full = run(ours(case, made), leaves_of(x, made), made)
        torch.manual_seed(0)
        got = run(ours(case, made), leaves_of(x, made), made, wanted=wanted)
    assert {k for k in got if k[0] != "y"} == set(wanted)
    unit = torch.finfo(F32).eps
    for name, value in got.items():
        # the A of fewer members are a smaller matrix, whose product may add up in another order
        assert (value - full[name]).abs().max() <= 32 * unit * full[name].abs().max(), name


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), ()], ids=str)
@pytest.mark.parametrize("members", [GroupCase.members, DROPS], ids=["plain", "drops"])
def test_an_output_without_a_gradient_adds_nothing(
    members: Any, used: tuple[int, ...], implementation: str, device: str
) -> None:
    case = GroupCase(bits="nf4", members=members)
    x, made = case.make(device=device)
    found = []
    with dispatch.use(implementation):
        for op in (ours(case, made), one_by_one(case, made)):
            held = {k: v.detach().requires_grad_() for k, v in leaves_of(x, made).items()}
            torch.manual_seed(0)
            ys = op(**held)
            # the input alone is in the graph where no output is used
            torch.autograd.backward(
                [ys[i] for i in used] or [held["x"] * 0],
                [made[i].g for i in used] or [torch.zeros_like(x)],
            )
            found.append({k: v.grad for k, v in held.items() if v.grad is not None})
    for name, want in found[1].items():
        got = found[0][name]
        assert (got - want).abs().max() <= 32 * torch.finfo(F32).eps * want.abs().max(), name
    for name in found[0].keys() - found[1].keys():
        assert not found[0][name].any(), name


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_under_autocast_it_is_what_it_is_without(
    dtype: torch.dtype, implementation: str, device: str
) -> None:
    case = GroupCase(bits="nf4", members=DROPS)
    x, made = case.make(device=device)
    values = leaves_of(x, made)
    with dispatch.use(implementation):
        torch.manual_seed(0)
        with torch.autocast(device, dtype=dtype):
            got = run(ours(case, made, compute_dtype(x)), values, made)
        torch.manual_seed(0)
        want = run(ours(case, made, dtype), values, made)
    assert got["y0"].dtype == dtype
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_it_saves_x_and_u_and_the_seeds_and_nothing_else(implementation: str, device: str) -> None:
    case = GroupCase(bits="nf4", dtype=BF16, members=DROPS, layout="strided")
    x, made = case.make(device=device)
    stored = [v for t in made for v in (*t.bits, t.a, t.b)]
    known = {v.data_ptr() for v in (x, *stored) if isinstance(v, Tensor)}
    new: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            new.append(tensor)
        return tensor

    held = {k: v.detach().requires_grad_() for k, v in leaves_of(x, made).items()}
    with dispatch.use(implementation), torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        ours(case, made)(**held)
    assert sorted(tuple(v.shape) for v in new) == [(2,), (case.m, 14)]


@pytest.mark.parametrize("members", [GroupCase.members, DROPS], ids=["plain", "drops"])
def test_gradcheck(members: Any) -> None:
    small = tuple((n // 8, min(r, 2), p, bias) for n, r, p, bias in members)
    case = GroupCase(m=2, k=8, members=small, dtype=F64)
    x, made = case.make()
    values = {k: v.detach().requires_grad_() for k, v in leaves_of(x, made).items()}

    def op(*args: Tensor) -> Any:
        torch.manual_seed(1)
        return ours(case, made)(**dict(zip(values, args, strict=True)))

    with dispatch.use("reference"):
        assert torch.autograd.gradcheck(op, tuple(values.values()))


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointing_draws_the_same_masks(
    reentrant: bool, implementation: str, device: str
) -> None:
    case = GroupCase(bits="nf4", members=DROPS)
    x, made = case.make(device=device)
    values = leaves_of(x, made)
    op = ours(case, made)

    def again(**held: Tensor) -> Any:
        flat = lambda *args: op(**dict(zip(held, args, strict=True)))  # noqa: E731
        return checkpoint(flat, *held.values(), use_reentrant=reentrant)

    with dispatch.use(implementation):
        found = []
        for call in (op, again):
            torch.manual_seed(3)
            found.append(run(call, values, made))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def test_compile_without_a_graph_break() -> None:
    """Tracing ends at the op, so that its implementation does not matter."""
    case = GroupCase(bits="nf4", members=DROPS)
    x, made = case.make()
    op = ours(case, made)
    torch._dynamo.reset()
    with dispatch.use("reference"):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (17, 5):
            part = [LowRankInputs(**{**vars(t), "g": t.g[:rows]}) for t in made]
            values = leaves_of(x[:rows], part)
            found = []
            for call in (compiled, op):
                torch.manual_seed(2)
                found.append(run(call, values, part))
            for name in found[1]:
                assert torch.equal(found[0][name], found[1][name]), name


def test_the_outputs_of_backward_do_not_share_memory(implementation: str, device: str) -> None:
    case = GroupCase(bits="nf4")
    x, made = case.make(device=device)
    got = {}
    held = {k: v.detach().requires_grad_() for k, v in leaves_of(x, made).items()}
    with dispatch.use(implementation):
        ys = ours(case, made)(**held)
        grads = torch.autograd.grad(ys, list(held.values()), [t.g for t in made])
    got = {v.untyped_storage()._cdata for v in grads}
    assert len(got) == len(held)


def test_what_does_not_fit() -> None:
    case = GroupCase(bits="nf4")
    x, made = case.make()
    members = members_of(case, made, leaves_of(x, made))
    first = members[0]
    assert isinstance(first.bits, Nf4)
    wrong: list[tuple[list[Member], str]] = [
        ([], "one layer at least, got none"),
        ([first, members[1]._replace(a=torch.zeros(1, 63))], "expected a \\(r, k=64\\)"),
        ([first, members[1]._replace(p=1.0)], "expected 0 <= p < 1"),
        ([first, members[1]._replace(bits=first.bits)], "expected W \\(n=16, k=64\\)"),
        (
            [first._replace(bits=first.bits._replace(dtype=BF16)), members[1]],
            "expected weights of one dtype, got \\['torch.bfloat16', 'torch.float32'\\]",
        ),
    ]
    for given, message in wrong:
        with pytest.raises(KernelError, match=message):
            low_rank_group(x, given, compute=F32, out=F32)
