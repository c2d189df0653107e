# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one batch: each row is what its adapter alone gives, against float64; the
base product runs once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt.errors import KernelError
from fastadapt.ops import dispatch, low_rank_steps
from fastadapt.ops.low_rank_mixed import Pair, low_rank_mixed
from fastadapt.ops.precision import compute_dtype
from fastadapt.testing import (
    LowRankCase,
    adapted,
    as_float64,
    base_layer,
    check,
    config_of,
    drop_factors,
    dtype_of,
    layer_input,
    plain_low_rank,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("poisoned")
RANKS, SCALES = (8, 1, 5), (1.7, 0.6, 2.0)
INDEX = (0, 2, -1, 0, 2, 1)
"""Rows of one adapter apart and together, rows of none, an adapter with a single row."""
N = 48
Leaves = dict[str, Tensor]


def leaves(bits: str, dtype: torch.dtype, device: str, rows: int = 3) -> tuple[Any, Leaves, Tensor]:
    t = LowRankCase(m=len(INDEX) * rows, bits=bits, dtype=dtype, n=N).make(device=device)
    g = torch.Generator().manual_seed(9)
    found = {"x": t.x.view(len(INDEX), rows, 64), "bias": t.bias}
    for i, r in enumerate(RANKS):
        found[f"a{i}"] = (torch.randn(r, 64, generator=g) / 8).to(device, dtype)
        found[f"b{i}"] = (torch.randn(N, r, generator=g) / r**0.5).to(device, dtype)
    return t, found, t.g.view(len(INDEX), rows, N)


def ours(t: Any, p: tuple[float, ...], dtype: torch.dtype) -> Callable[..., Tensor]:
    def op(x: Tensor, bias: Tensor, **ab: Tensor) -> Tensor:
        pairs = [Pair(ab[f"a{i}"], ab[f"b{i}"], SCALES[i], p[i]) for i in range(len(RANKS))]
        return low_rank_mixed(
            x, pairs, INDEX, n=N, bits=t.bits, bias=bias, compute=dtype, out=dtype
        )

    return op


def by_rows(t: Any, p: tuple[float, ...], seeds: Tensor, dtype: torch.dtype) -> Any:
    """Each row by the definition of its adapter alone."""
    w = None if t.w is None else t.w.to(dtype)

    def op(x: Tensor, bias: Tensor, **ab: Tensor) -> Tensor:
        out = []
        for j, i in enumerate(INDEX):
            if i < 0:
                base = x.new_zeros(*x.shape[1:-1], N) if w is None else x[j] @ w.t()
                out.append(base + bias)
                continue
            mine = [q for q, k in enumerate(INDEX) if k == i]
            drop = None
            if p[i]:
                shape = (len(mine), *x.shape[1:])
                drop = drop_factors(seeds[i : i + 1], shape, p[i])[mine.index(j)]
            pair = ab[f"a{i}"], ab[f"b{i}"]
            out.append(plain_low_rank(x[j], w, *pair, bias, SCALES[i], drop))
        return torch.stack(out)

    return op


def run(op: Any, values: Leaves, g: Tensor, dtype: torch.dtype) -> Leaves:
    held = {k: v.detach().to(dtype).requires_grad_() for k, v in values.items()}
    y = op(**held)
    y.backward(g.to(y.dtype))
    return {"y": y.detach(), **{k: v.grad for k, v in held.items() if v.grad is not None}}


@pytest.mark.parametrize(
    ("bits", "dtype", "p"),
    [
        *itertools.product(
            ("none", "dense", "nf4"), (F64, F32, BF16, F16), ((0.0, 0.0, 0.0), (0.3, 0.0, 0.5))
        )
    ],
    ids=str,
)
def test_each_row_is_its_adapter_alone(
    bits: str, dtype: torch.dtype, p: tuple[float, ...], implementation: str, device: str
) -> None:
    t, values, g = leaves(bits, dtype, device)
    if implementation == "triton" and dtype == F64:
        with dispatch.use("triton"), pytest.raises(KernelError, match="triton"):
            ours(t, p, dtype)(**values)
        return
    torch.manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (3,), dtype=torch.int64, device=device)
    torch.manual_seed(0)
    with dispatch.use(implementation):
        got = run(ours(t, p, dtype), values, g, dtype)
    oracle = run(by_rows(t, p, seeds, F64), values, g, F64)
    narrow = F32 if dtype == F64 else dtype
    plain = run(by_rows(t, p, seeds, narrow), values, g, narrow)
    if dtype == F64:
        plain = {k: as_float64(v, oracle[k]) for k, v in plain.items()}
    assert set(got) == set(oracle)
    for name in got:
        check(got[name], plain[name], oracle[name], what=name)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_under_autocast_it_is_what_it_is_without(
    dtype: torch.dtype, implementation: str, device: str
) -> None:
    """The op is told its dtypes: autocast must not round the products inside it again."""
    t, values, g = leaves("nf4", F32, device)
    p = (0.3, 0.0, 0.5)
    with dispatch.use(implementation):
        torch.manual_seed(1)
        with torch.autocast(device, dtype=dtype):
            kind = compute_dtype(values["x"])
            got = run(ours(t, p, kind), values, g, F32)
        torch.manual_seed(1)
        want = run(ours(t, p, dtype), values, g, F32)
    assert kind == got["y"].dtype == dtype
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("bits", ["dense", "nf4"])
def test_a_scaled_step_in_fp16(bits: str, implementation: str, device: str) -> None:
    """Under autocast and a GradScaler: what is left after unscaling is right to fp16's budget, and
    a scale that overflows is seen in the gradients of every adapter that has rows."""
    t, values, g = leaves(bits, F32, device)
    none = (0.0,) * len(RANKS)

    def step(op: Any, scale: float) -> tuple[Leaves, bool]:
        held = {k: v.detach().clone().requires_grad_() for k, v in values.items()}
        before = {k: v.detach().clone() for k, v in held.items()}
        optimizer = torch.optim.SGD(held.values(), lr=1.0)
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        with torch.autocast(device, dtype=F16):
            y = op(**held)
        scaler.scale((y.float() * g).sum()).backward()
        scaler.unscale_(optimizer)
        grads = {k: v.grad.clone() for k, v in held.items() if v.grad is not None}
        scaler.step(optimizer)
        scaler.update()
        stood = all(torch.equal(held[k].detach(), before[k]) for k in held)
        return grads, stood

    with dispatch.use(implementation):
        got, stood = step(ours(t, none, F16), 2.0**7)
        inf, skipped = step(ours(t, none, F16), 2.0**30)
    rows = by_rows(t, none, torch.empty(0), F32)
    plain, _ = step(lambda **held: rows(**held).to(F16), 2.0**7)
    oracle = run(by_rows(t, none, torch.empty(0), F64), values, g, F64)
    unit = torch.finfo(F16).eps / 2
    moved = {k: v + v * unit * v.sin().sign() for k, v in values.items()}
    off = run(by_rows(t, none, torch.empty(0), F64), moved, g, F64)
    assert set(got) == set(values)
    assert (stood, skipped) == (False, True)
    for name in got:
        # what rounding each leaf to fp16 once does, since autocast rounds them
        cost = float((off[name] - oracle[name]).abs().max())
        check(got[name], plain[name], oracle[name], cost=cost, what=name)
        assert not inf[name].isfinite().all(), name


def test_the_base_product_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    t, values, g = leaves("nf4", F32, "cpu")
    calls: list[bool] = []
    product = low_rank_steps.REFERENCE.product

    def counted(*args: Any) -> Tensor:
        calls.append(args[-1])
        return product(*args)

    steps = low_rank_steps.REFERENCE._replace(product=counted)
    monkeypatch.setattr("fastadapt.ops.low_rank_mixed.REFERENCE", steps)
    with dispatch.use("reference"):
        run(ours(t, (0.0,) * 3, F32), values, g, F32)
    assert calls == [True, False]


def test_gradcheck() -> None:
    t, values, _ = leaves("dense", F64, "cpu", rows=1)
    held = [v.detach().requires_grad_() for v in values.values()]
    op = ours(t, (0.0,) * 3, F64)
    with dispatch.use("reference"):
        assert torch.autograd.gradcheck(
            lambda *args: op(**dict(zip(values, args, strict=True))), held
        )


@pytest.mark.parametrize("wanted", ["x", "a0", "b2", "bias"])
def test_gradients_that_are_needed(wanted: str, implementation: str, device: str) -> None:
    t, values, g = leaves("nf4", F32, device)
    op = ours(t, (0.0,) * 3, F32)
    with dispatch.use(implementation):
        full = run(op, values, g, F32)
        held = {k: v.detach().requires_grad_(k == wanted) for k, v in values.items()}
        op(**held).backward(g)
    assert [k for k, v in held.items() if v.grad is not None] == [wanted]
    assert torch.equal(held[wanted].grad, full[wanted])


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointing_draws_the_same_masks(
    reentrant: bool, implementation: str, device: str
) -> None:
    t, values, g = leaves("nf4", F32, device)
    op = ours(t, (0.3, 0.0, 0.5), F32)

    def again(**held: Tensor) -> Tensor:
        flat = lambda *args: op(**dict(zip(held, args, strict=True)))  # noqa: E731
        return checkpoint(flat, *held.values(), use_reentrant=reentrant)  # type: ignore[no-any-return]

    with dispatch.use(implementation):
        found = []
        for call in (op, again):
            torch.manual_seed(3)
            found.append(run(call, values, g, F32))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_a_graph_break(dynamic: bool, implementation: str, device: str) -> None:
    torch._dynamo.reset()
    with dispatch.use(implementation):
        for rows in (3, 5):
            t, values, g = leaves("nf4", F32, device, rows)
            op = ours(t, (0.0, 0.0, 0.0), F32)
            compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            got, want = run(compiled, values, g, F32), run(op, values, g, F32)
            for name in want:
                assert torch.equal(got[name], want[name]), name


def test_an_empty_batch_of_rows_and_rows_of_no_adapter(implementation: str, device: str) -> None:
    t, values, _ = leaves("nf4", F32, device)
    with dispatch.use(implementation):
        x = values["x"][:, :0]
        assert ours(t, (0.0,) * 3, F32)(**{**values, "x": x}).shape == (len(INDEX), 0, N)
        y = low_rank_mixed(values["x"], [], [-1], n=N, bits=t.bits, compute=F32, out=F32)
    want = values["x"].double() @ t.w.double().t()
    check(y, values["x"] @ t.w.t(), want)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        ((0, 1, 2, 3, 0, 1), {}, "expected an index below 3"),
        ((0, 1, 2, 0), {}, "expected 18 rows in equal blocks, got an index of 4"),
        ((), {}, "in equal blocks"),
        (INDEX, {"b": torch.zeros(47, 8)}, "expected"),
        (INDEX, {"a": torch.zeros(8, 63)}, "expected a \\(r, k=64\\)"),
        (INDEX, {"p": 1.0}, "expected 0 <= p < 1"),
    ],
)
def test_what_does_not_fit(index: Any, change: dict[str, Any], message: str) -> None:
    t, values, _ = leaves("nf4", F32, "cpu")
    pairs = [Pair(values[f"a{i}"], values[f"b{i}"], 1.0, 0.0) for i in range(3)]
    pairs[0] = pairs[0]._replace(**change)
    with pytest.raises(KernelError, match=message):
        low_rank_mixed(values["x"], pairs, index, n=N, bits=t.bits, compute=F32, out=F32)


@pytest.mark.parametrize("fmt", ["dense32", "bnb4", "bnb8"])
@pytest.mark.parametrize("other", ["lora", "dora"])
def test_a_layer_multiplies_by_its_base_once(
    fmt: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every adapter is a low-rank pair; DoRA is not. All of them are trained at once."""
    layer = adapted(base_layer(fmt, "linear"), config_of("lora"), config_of(other, r=3))
    x = layer_input(fmt, "linear", 4, 5).requires_grad_()
    names = ["a1", "__base__", "a0", "a1"]
    with torch.no_grad():
        alone = []
        for i, name in enumerate(names):
            alone.append(layer.stack([name])(x[i : i + 1]))
    calls: list[int] = []
    frozen = type(layer.frozen)
    for asked in ("low_rank_mixed", "low_rank", "__call__"):
        real = getattr(frozen, asked)

        def counted(self: Any, *args: Any, real: Any = real) -> Tensor:
            calls.append(1)
            return real(self, *args)  # type: ignore[no-any-return]

        monkeypatch.setattr(frozen, asked, counted)
    y = layer(x, adapter_names=names)
    once = other == "lora"
    # an int8 layer multiplies itself: one call of it inside the one of low_rank_mixed
    assert not once or len(calls) == 1 + (fmt == "bnb8")
    assert (len(calls) < 3) == once
    unit = torch.finfo(dtype_of(fmt)).eps
    assert (y - torch.cat(alone)).abs().max() <= 16 * unit * y.abs().max()
    y.square().sum().backward()
    for name in ("a0", "a1"):
        for key, part in layer.parts_of(name).items():
            for parameter in part.parameters():
                assert parameter.grad is not None, (name, key)
                assert parameter.grad.abs().sum() > 0
