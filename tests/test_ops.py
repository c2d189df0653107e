# SPDX-License-Identifier: Apache-2.0
"""Every op against float64, by every implementation, in every dtype: values, gradients, masks, and
what PyTorch asks of an op (opcheck, torch.compile, checkpointing)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt.errors import KernelError
from fastadapt.ops import dispatch, scratch
from fastadapt.ops.bits import Dense, Nf4, flatten
from fastadapt.ops.dropout import DropoutFunction, draw_seed, dropout, keep_mask, threshold
from fastadapt.ops.low_rank import LowRankFunction, low_rank
from fastadapt.ops.nf4 import nf4_dequant
from fastadapt.ops.precision import compute_dtype
from fastadapt.ops.rotate import rotate
from fastadapt.ops.row_norm import row_norm
from fastadapt.testing import (
    LowRankCase,
    LowRankInputs,
    as_float64,
    check,
    decoded,
    drop_factors,
    moved,
    plain_low_rank,
    quantised,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAMES = ("x", "a", "b", "bias")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What nobody wrote reads as NaN, in every empty tensor and in the reused buffers."""
    take = scratch.take
    monkeypatch.setattr(scratch, "take", lambda *args: take(*args).fill_(torch.nan))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_poison_works() -> None:
    assert torch.empty(3).isnan().all()
    assert scratch.take((2, 3), F32).isnan().all()


# low_rank

EVERYWHERE = [
    LowRankCase(bits=bits, dtype=dtype, p=p)
    for bits, dtype, p in itertools.product(
        ("none", "dense", "nf4", "nf4-flat", "fp4"), (F64, F32, BF16, F16), (0.0, 0.3)
    )
]
SHAPES = [
    LowRankCase(bits=bits, dtype=dtype, **sizes)
    for bits, dtype in (("dense", F32), ("nf4", F32), ("nf4", BF16), ("none", F16))
    for sizes in (
        {"m": 0}, {"m": 1}, {"m": 3, "p": 0.3}, {"r": 1}, {"r": 5}, {"r": 64}, {"n": 33},
        {"n": 3, "k": 32}, {"n": 7, "k": 192}, {"m": 1, "n": 1}, {"bias": False},
        {"m": 6, "layout": "batch"}, {"layout": "strided", "p": 0.3}, {"layout": "transposed"},
    )
]  # fmt: skip
MIXED = [
    LowRankCase(bits="dense", dtype=BF16, pair=F32),
    LowRankCase(bits="nf4", dtype=BF16, pair=F32, p=0.3),
    LowRankCase(bits="nf4", dtype=F16, pair=F32),
    LowRankCase(bits="nf4", dtype=F32, compute=BF16),
    LowRankCase(bits="dense", dtype=F32, compute=F16),
]


@pytest.mark.parametrize("case", [*EVERYWHERE, *SHAPES, *MIXED], ids=str)
def test_low_rank_and_its_gradients(case: LowRankCase, implementation: str, device: str) -> None:
    t = case.make(device=device)
    if implementation == "triton" and case.dtype == F64:
        with dispatch.use(implementation), pytest.raises(KernelError, match="triton"):
            ours(case, t)(t.x, t.a, t.b, t.bias)
        return
    drop = drop_of(case, t)
    oracle = run(by_hand(case, t, drop, F64), t, F64)
    plain_dtype = F32 if case.dtype == F64 else None
    plain = run(by_hand(case, t, drop, plain_dtype), t, plain_dtype)
    if case.dtype == F64:
        plain = {k: as_float64(v, oracle[k]) for k, v in plain.items()}
    torch.manual_seed(0)
    with dispatch.use(implementation):
        got = run(ours(case, t), t, None)
    for name in got:
        check(got[name], plain[name], oracle[name], what=name)


@pytest.mark.parametrize("wanted", [(), ("x",), ("a",), ("b",), ("bias",), ("x", "b")], ids=str)
def test_low_rank_computes_the_gradients_that_are_needed(
    wanted: tuple[str, ...], implementation: str, device: str
) -> None:
    case = LowRankCase(bits="nf4", p=0.3)
    t = case.make(device=device)
    with dispatch.use(implementation):
        torch.manual_seed(0)
        full = run(ours(case, t), t, None)
        torch.manual_seed(0)
        got = run(ours(case, t), t, None, wanted)
    assert set(got) == {"y", *wanted}
    for name, value in got.items():
        assert torch.equal(value, full[name])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("bits", ["dense", "nf4"])
def test_low_rank_under_autocast_is_what_it_is_without(
    bits: str, dtype: torch.dtype, implementation: str, device: str
) -> None:
    """The op is told its dtypes: autocast must not round the products inside it again."""
    t = LowRankCase(bits=bits).make(device=device)
    with dispatch.use(implementation):
        with torch.autocast(device, dtype=dtype):
            kind = compute_dtype(t.x)
            got = run(ours(LowRankCase(bits=bits), t, kind), t, None, g=t.g.to(dtype))
        want = run(ours(LowRankCase(bits=bits), t, dtype), t, None, g=t.g.to(dtype))
    assert kind == got["y"].dtype == dtype
    for name in got:
        assert torch.equal(got[name], want[name])


def test_low_rank_saves_x_and_u_and_a_seed_and_nothing_else(
    implementation: str, device: str
) -> None:
    case = LowRankCase(bits="nf4", p=0.3, dtype=BF16, layout="strided")
    t = case.make(device=device)
    known = {v.data_ptr() for v in (t.x, t.a, t.b, *t.bits) if isinstance(v, Tensor)}
    new: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            new.append(tensor)
        return tensor

    leaves = [v.detach().requires_grad_() for v in (t.x, t.a, t.b, t.bias)]
    with dispatch.use(implementation), torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        ours(case, t)(*leaves)
    assert sorted(tuple(v.shape) for v in new) == [(1,), (case.m, case.r)]


@pytest.mark.parametrize("bits", ["none", "dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_low_rank_gradcheck(bits: str, p: float) -> None:
    t = LowRankCase(m=2, k=8, n=3, r=2, bits=bits, dtype=F64).make()
    seed = draw_seed(t.x.device) if p else None
    leaves = [v.detach().requires_grad_() for v in (t.x, t.bias, t.a, t.b)]

    def op(*args: Tensor) -> Any:
        return LowRankFunction.apply(*args, 1.7, p, seed, F64, F64, *flatten(t.bits))

    with dispatch.use("reference"):
        assert torch.autograd.gradcheck(op, leaves)


def test_second_derivatives_are_refused() -> None:
    t = LowRankCase().make()
    leaves = [v.detach().requires_grad_() for v in (t.x, t.a, t.b, t.bias)]
    for y in (ours(LowRankCase(), t)(*leaves), dropout(leaves[0], 0.3)):
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointing_draws_the_same_mask(
    reentrant: bool, implementation: str, device: str
) -> None:
    case = LowRankCase(bits="nf4", p=0.3)
    t = case.make(device=device)
    op = ours(case, t)
    with dispatch.use(implementation):
        torch.manual_seed(3)
        want = run(op, t, None)
        torch.manual_seed(3)
        got = run(lambda *args: checkpoint(op, *args, use_reentrant=reentrant), t, None)
    for name in want:
        assert torch.equal(got[name], want[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.zeros(8, 63)}, "expected a \\(r, k=64\\)"),
        ({"a": torch.zeros(8, 64, 1)}, "expected a \\(r, k=64\\)"),
        ({"b": torch.zeros(48, 7)}, "got a \\(8, 64\\) and b \\(48, 7\\)"),
        ({"b": torch.zeros(47, 8)}, "expected W \\(n=47, k=64\\), got \\(48, 64\\)"),
        ({"bias": torch.zeros(1)}, "expected bias \\(n=48,\\), got \\(1,\\)"),
        ({"bias": torch.zeros(48, 1)}, "expected bias \\(n=48,\\), got \\(48, 1\\)"),
        ({"p": 1.0}, "expected 0 <= p < 1"),
        ({"p": -0.1}, "expected 0 <= p < 1"),
        ({"p": 1 - 2**-18}, "expected 0 <= p < 1"),
    ],
)
def test_low_rank_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    t = LowRankCase(bits="nf4").make()
    args = {"a": t.a, "b": t.b, "bias": t.bias, "p": 0.0, **changes}
    with pytest.raises(KernelError, match=message):
        low_rank(
            t.x, args["a"], args["b"], 1.0, bits=t.bits, bias=args["bias"], p=args["p"],
            compute=F32, out=F32,
        )  # fmt: skip


# nf4_dequant

WEIGHTS = [(1, 64), (3, 32), (5, 64), (33, 64), (48, 128)]


@pytest.mark.parametrize("size", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "nf4-flat", "fp4", "fp4-flat"])
def test_nf4_dequant_is_bitsandbytes(
    size: tuple[int, int], dtype: torch.dtype, kind: str, implementation: str, device: str
) -> None:
    name, _, flat = kind.partition("-")
    bits = quantised(
        torch.randn(size, generator=torch.Generator().manual_seed(4)).to(dtype), name,
        nested=not flat,
    )  # fmt: skip
    want = decoded(bits).to(device)
    with dispatch.use(implementation):
        for out in (dtype, F32):
            got = nf4_dequant(moved(bits, device), out)
            assert got.dtype == out
            assert torch.equal(got, want.to(out))


def test_nf4_dequant_of_an_odd_number_of_elements(implementation: str, device: str) -> None:
    bits = moved(quantised(torch.randn(1, 64)), device)
    with dispatch.use(implementation):
        got = nf4_dequant(bits._replace(n=3, k=21))
        assert torch.equal(got.view(-1), nf4_dequant(bits).view(-1)[:63])


# dropout


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


# row_norm


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


# what PyTorch asks of an op


def op_arguments() -> dict[str, list[tuple[Any, ...]]]:
    t = LowRankCase(m=4, bits="nf4").make()
    dense = LowRankCase(m=4, dtype=BF16, pair=F32).make()
    seed, u = torch.tensor([12]), torch.randn(4, 8)
    turn = torch.randn(2, 4, 4)
    flat, nothing = flatten(t.bits), flatten(None)
    assert isinstance(t.bits, Nf4)
    return {
        "nf4_dequant": [(*t.bits, F32), (*t.bits, BF16)],
        "dropout": [(t.x, seed, 0.3, BF16)],
        "row_norm": [(t.a, t.b, 1.7, *flat), (t.a, t.b, 1.7, *flatten(dense.bits))],
        "low_rank_fwd": [
            (t.x, t.bias, t.a, t.b, 1.7, 0.3, seed, F32, F32, *flat),
            (dense.x, None, dense.a, dense.b, 1.7, 0.0, None, BF16, BF16, *flatten(dense.bits)),
            (t.x, None, t.a, t.b, 1.7, 0.0, None, F32, F32, *nothing),
        ],
        "low_rank_bwd": [
            (t.g, t.x, u, t.a, t.b, 1.7, 0.3, seed, F32, True, True, True, *flat),
            (t.g, t.x, u, t.a, t.b, 1.7, 0.0, None, F32, True, False, False, *flat),
            (t.g, t.x, u, t.a, t.b, 1.7, 0.0, None, F32, False, True, False, *nothing),
        ],
        "rotate_fwd": [(t.x, turn, False, F32), (t.x, turn, True, BF16)],
        "rotate_bwd": [(t.x, torch.randn_like(t.x), turn)],
    }


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, calls in op_arguments().items() for i in range(len(calls))]
)
def test_opcheck(name: str, index: int, implementation: str, device: str) -> None:
    args = [v.to(device) if isinstance(v, Tensor) else v for v in op_arguments()[name][index]]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor",
             "test_aot_dispatch_static", "test_aot_dispatch_dynamic")  # fmt: skip
    op = dispatch.OPS[name]
    # an op without such an implementation is checked with its reference, in the other case
    chosen = "reference" if op.why_not(implementation, *args) else implementation
    with dispatch.use(chosen):
        torch.library.opcheck(op.call, tuple(args), test_utils=tests)


def test_every_op_has_a_case_for_opcheck() -> None:
    assert set(op_arguments()) == set(dispatch.OPS)


def test_rotate_is_the_block_diagonal_product_and_its_gradients() -> None:
    x = torch.randn(3, 24, dtype=F64, requires_grad=True)
    d = torch.randn(2, 4, 4, dtype=F64, requires_grad=True)
    whole = torch.block_diag(*(torch.eye(4, dtype=F64) + d).repeat(3, 1, 1))
    exact = x @ whole
    assert ((rotate(x, d) - exact).abs() <= 25 * 2**-53 * (x.abs() @ whole.abs())).all()
    assert torch.autograd.gradcheck(rotate, (x, d))


@pytest.mark.parametrize("index", range(3))
def test_outputs_that_are_not_needed_do_not_share_memory(
    index: int, implementation: str, device: str
) -> None:
    args = [
        v.to(device) if isinstance(v, Tensor) else v for v in op_arguments()["low_rank_bwd"][index]
    ]
    with dispatch.use(implementation):
        outputs = dispatch.OPS["low_rank_bwd"](*args)
    storages = {v.untyped_storage()._cdata for v in outputs}
    assert len(storages) == 3


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile_without_a_graph_break(
    p: float, dynamic: bool, implementation: str, device: str
) -> None:
    case = LowRankCase(bits="nf4", p=p)
    t = case.make(device=device)
    op = ours(case, t)
    torch._dynamo.reset()
    with dispatch.use(implementation):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for rows in (17, 5):
            part = LowRankInputs(**{**vars(t), "x": t.x[:rows], "g": t.g[:rows]})
            torch.manual_seed(2)
            got = run(compiled, part, None)
            torch.manual_seed(2)
            want = run(op, part, None)
            for name in want:
                assert torch.equal(got[name], want[name]), name


# helpers

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


def test_the_cases_cover_what_they_say() -> None:
    """A guard against an empty product: every format, dtype and layout is among the cases."""
    cases = [*EVERYWHERE, *SHAPES, *MIXED]
    assert len({str(c) for c in cases}) == len(cases)
    assert {c.bits for c in cases} == {"none", "dense", "nf4", "nf4-flat", "fp4"}
    assert {c.layout for c in cases} == {"rows", "batch", "strided", "transposed"}
    assert isinstance(LowRankCase().make().bits, Dense)
