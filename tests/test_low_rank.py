# SPDX-License-Identifier: Apache-2.0
"""low_rank against float64, by every implementation, in every dtype, weight format and layout:
values, gradients, masks, checkpointing and torch.compile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastadapt
from fastadapt.errors import KernelError
from fastadapt.ops import dispatch
from fastadapt.ops.bits import Dense, flatten
from fastadapt.ops.dropout import draw_seed, dropout
from fastadapt.ops.low_rank import LowRankFunction, low_rank
from fastadapt.ops.precision import compute_dtype
from fastadapt.testing import LowRankCase, LowRankInputs, as_float64, check
from tests.low_rank_runs import by_hand, drop_of, ours, run
from tests.op_arguments import op_arguments

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("poisoned")

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


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("m", [1, 17, 70])
@pytest.mark.parametrize("bits", ["dense", "nf4"])
def test_a_large_low_rank_part_does_not_coarsen_the_base_product(
    bits: str, m: int, dtype: torch.dtype, implementation: str, device: str
) -> None:
    """Sums that start from the low-rank part, 64 times the base product, round at its size. That
    part has one term here, a power of two times an input, and so no error of its own."""
    case = LowRankCase(m=m, n=512, k=512, r=1, bits=bits, dtype=dtype, bias=False)
    t = case.make(device=device)
    one, all_ = torch.zeros_like(t.a), torch.ones_like(t.a)
    one[0, 0] = 1
    steep = LowRankCase(scale=64.0, dtype=dtype)
    w = t.w.double()
    with dispatch.use(implementation):
        y = ours(steep, t)(t.x, one, all_.t().contiguous(), None)
        x = t.x.detach().requires_grad_()
        ours(steep, t)(x, all_, one.t().contiguous(), None).backward(t.g)
    for got, v, product in ((y, t.x, lambda v, w: v @ w.t()), (x.grad, t.g, lambda v, w: v @ w)):
        exact = product(v.double(), w) + 64 * v[:, :1].double()
        plain = product(v, t.w) + 64 * v[:, :1]
        assert (got - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("shape", [(1, 20, 20), (7, 576, 1536), (3, 100, 256, 512)], ids=str)
@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_an_adapter_of_zeros_changes_no_bit_of_a_dense_layer(
    shape: tuple[int, ...], dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU's products round by the order of their sums: the layer's own is taken."""
    *rows, k, n = shape
    layer = torch.nn.Linear(k, n, dtype=dtype)
    x = torch.randn(*rows, k, dtype=dtype, generator=torch.Generator().manual_seed(n))
    want = layer(x)
    root = fastadapt.get_peft_model(
        torch.nn.Sequential(layer), fastadapt.LoraConfig(target_modules=["0"])
    )
    monkeypatch.setenv("FASTADAPT_IMPL", impl)
    assert torch.equal(root(x), want)


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


def test_the_cases_cover_what_they_say() -> None:
    """A guard against an empty product: every format, dtype and layout is among the cases."""
    cases = [*EVERYWHERE, *SHAPES, *MIXED]
    assert len({str(c) for c in cases}) == len(cases)
    assert {c.bits for c in cases} == {"none", "dense", "nf4", "nf4-flat", "fp4"}
    assert {c.layout for c in cases} == {"rows", "batch", "strided", "transposed"}
    assert isinstance(LowRankCase().make().bits, Dense)
