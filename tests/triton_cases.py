# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel through its op, under Triton's interpreter on a CPU, in fp32 and fp16.

``python triton_cases.py ID ...`` runs cases and writes {id: what went wrong, or null} to stdout;
test_triton.py starts it once, because TRITON_INTERPRET is read when a kernel is decorated. bf16 is
not here: the interpreter computes it wrongly, and says nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.errors import KernelError
from fastadapt.ops import dropout as dropout_op
from fastadapt.ops import native, precision
from fastadapt.ops.bits import Dense, Nf4, flatten
from fastadapt.ops.dispatch import OPS, use
from fastadapt.ops.dropout import draw_seed, dropout_reference
from fastadapt.ops.low_rank import LowRankFunction
from fastadapt.ops.nf4 import nf4_dequant
from fastadapt.ops.reflect import ReflectFunction
from fastadapt.ops.rotate import RotateFunction
from fastadapt.ops.row_norm import row_norm
from fastadapt.ops.scale import scale
from fastadapt.testing import (
    GroupCase,
    LowRankCase,
    check,
    decoded,
    drop_factors,
    plain_low_rank,
    quantised,
)

F64, F32, F16 = torch.float64, torch.float32, torch.float16
BITS = {F32: torch.int32, F16: torch.int16}


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Signed zeros count."""
    as_int = BITS[want.dtype]
    return got.dtype == want.dtype and torch.equal(got.view(as_int), want.view(as_int))


@contextmanager
def in_own_dtype() -> Iterator[None]:
    """Products in fp16 where fp16 was asked for: a CPU would widen them, and the kernels' fp16
    would not be seen."""
    held = precision._native_on_cpu
    precision._native_on_cpu = lambda dtype: True  # type: ignore[assignment]
    try:
        yield
    finally:
        precision._native_on_cpu = held


# decode


def decode(n: int, k: int, kind: str, nested: bool, blocksize: int, dtype: torch.dtype) -> None:
    """bitsandbytes' bits, and the same values in a wider dtype. FP4 has two zeros: bitsandbytes
    gives one of them another sign than its own codebook has, and there values are compared."""
    g = torch.Generator().manual_seed(n + k)
    bits = quantised(torch.randn(n, k, generator=g).to(dtype), kind, nested=nested,
                     blocksize=blocksize)  # fmt: skip
    want = decoded(bits).view(n, k)
    with use("triton"):
        got, wide = nf4_dequant(bits), nf4_dequant(bits, F32)
    with use("reference"):
        assert same_bits(got, nf4_dequant(bits))
    assert same_bits(got, want) if kind == "nf4" else torch.equal(got, want)
    assert same_bits(wide, got.float())


DECODE_SHAPES = ((1, 64), (3, 5), (7, 24), (130, 64), (5, 192))
"""Below a block; odd; with k and n k off the blocks; more than one program; several blocks."""
DECODES = {
    f"decode-{n}x{k}-{kind}{'-nested' if nested else ''}-{block}-{_short}": partial(
        decode, n, k, kind, nested, block, dtype
    )
    for (n, k), kind, nested, block, (_short, dtype) in itertools.product(
        DECODE_SHAPES, ("nf4", "fp4"), (False, True), (64, 128), (("fp32", F32), ("fp16", F16))
    )
}


def decode_two_levels() -> None:
    """More than 256 blocks, so that the second nested scale is read."""
    decode(70, 256, "nf4", True, 64, F16)


def decode_group(count: int, nested: bool, dtype: torch.dtype) -> None:
    """Weights of different sizes in one launch, the first of more than one program: each has the
    bits that it has alone, and what is between the buffers stays as it was."""
    from fastadapt.kernels.nf4 import nf4_dequant_group_into

    shapes = ((130, 128), (33, 64), (3, 64), (70, 128))[:count]
    held = [quantised(torch.randn(n, k).to(dtype), nested=nested) for n, k in shapes]
    sizes = [v.n * v.k for v in held]
    buffer = torch.full((sum(sizes) + 8 * count,), torch.nan, dtype=dtype)
    parts = [part[:size] for part, size in zip(buffer.split([v + 8 for v in sizes]), sizes,
                                               strict=True)]  # fmt: skip
    nf4_dequant_group_into(parts, [v[:8] for v in held], dtype)
    for part, bits in zip(parts, held, strict=True):
        assert same_bits(part.view(bits.shape), decoded(bits))
    assert int(buffer.isnan().sum()) == 8 * count


def decode_group_of_two_kinds() -> None:
    """Nested and flat absmax, two block sizes, nothing at all: what fits together is together."""
    from fastadapt.kernels.nf4 import nf4_dequant_group_into

    held = [quantised(torch.randn(5, 128), nested=nested, blocksize=block)
            for nested, block in ((True, 64), (False, 64), (True, 128), (True, 64))]  # fmt: skip
    outs = [torch.full((5, 128), torch.nan) for _ in held]
    nf4_dequant_group_into([*outs, torch.empty(0)], [*(v[:8] for v in held), held[0][:8]], F32)
    for out, bits in zip(outs, held, strict=True):
        assert same_bits(out, decoded(bits))


def decode_misaligned() -> None:
    """Bytes that start off a word: a slice of a larger buffer, as fused expert weights have."""
    bits = quantised(torch.randn(64, 128), nested=True)
    buffer = torch.zeros(bits.packed.numel() + 1, dtype=torch.uint8)
    buffer[1:] = bits.packed.reshape(-1)
    moved = bits._replace(packed=buffer[1:])
    a, b = torch.randn(5, 128) / 10, torch.randn(64, 5)
    w = decoded(bits)
    with use("triton"):
        assert same_bits(nf4_dequant(moved), w)
        got = row_norm(moved, a, b, 0.5)
    oracle = torch.linalg.vector_norm(w.double() + 0.5 * (b.double() @ a.double()), dim=1)
    check(got, torch.linalg.vector_norm(w + 0.5 * (b @ a), dim=1), oracle)


def pairs(transposed: bool) -> None:
    """With the pair table the product sees the codebook rounded to 16 bits before it is scaled,
    and no other difference: times the identity, that is the decoded weight itself."""
    from fastadapt.kernels.nf4_gemm import add_product

    bits = quantised(torch.randn(70, 64).to(F16), nested=True)
    rounded = bits._replace(code=bits.code.half().float())
    unit = torch.eye(64 if transposed else 70, dtype=F16)
    want = nf4_dequant(rounded)
    assert not torch.equal(want, nf4_dequant(bits))
    os.environ["FASTADAPT_NF4_TABLE"] = "pair"
    try:
        y = torch.zeros(*(want.t() if transposed else want).shape, dtype=F16)
        got = add_product(y, unit, *bits, transposed=transposed)
    finally:
        del os.environ["FASTADAPT_NF4_TABLE"]
    assert torch.equal(got.t() if transposed else got, want)


GROUPED: dict[str, Callable[[], None]] = {
    f"decode-group_of_{count}{'-nested' if nested else ''}": partial(
        decode_group, count, nested, F16 if nested else F32
    )
    for count, nested in itertools.product((1, 2, 3, 4), (False, True))
}
GROUPED["decode-group_of_two_kinds"] = decode_group_of_two_kinds


# dropout


def drop(numel: int, p: float, dtype: torch.dtype, out: torch.dtype) -> None:
    """The bits of the reference and of the native kernel, -0.0 where a negative is dropped."""
    g = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=g).to(dtype)
    x[::7] = -0.0
    for seed in (torch.tensor([77 << 40]), torch.tensor([-(2**63)])):
        want = dropout_reference(x, seed, p, out)
        with use("triton"):
            got = dropout_op.dropout_fwd(x, seed, p, out)
        assert same_bits(got, want)
        if native.available():
            assert same_bits(got, native.dropout(x, seed, p, out))
    if numel > 100:
        assert ((got == 0) & got.signbit() & (x != 0)).any()


def drop_strided() -> None:
    """The mask counts elements in the order of the tensor, not of memory."""
    x, seed = torch.randn(24, 16).t(), torch.tensor([5])
    with use("triton"):
        got = dropout_op.dropout_fwd(x, seed, 0.5, F32)
    assert same_bits(got, dropout_reference(x.contiguous(), seed, 0.5, F32))


DROPS = {
    f"dropout-{numel}-p{p}-{name}": partial(drop, numel, p, dtype, out)
    for numel, p, (name, dtype, out) in itertools.product(
        (0, 1, 7, 8, 2047, 2048, 4099), (0.05, 0.5, 0.999),
        (("fp32", F32, F32), ("fp16", F16, F16), ("fp16-to-fp32", F16, F32)),
    )
}  # fmt: skip


# low_rank


def low_rank(case: LowRankCase, x_layout: str = "", g_layout: str = "") -> None:
    """y and every gradient against float64, in the budget; unwritten memory reads as NaN."""
    t = case.make()
    x, g = _laid_out(t.x, x_layout), _laid_out(t.g, g_layout)
    torch.manual_seed(0)
    factors = drop_factors(draw_seed(x.device), x.shape, case.p) if case.p else None

    def ours(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        seed = draw_seed(x.device) if case.p else None
        y: Tensor = LowRankFunction.apply(
            x, bias, a, b, case.scale, case.p, seed, case.dtype, case.dtype, *flatten(t.bits)
        )
        return y

    def plain(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        w = None if t.w is None else t.w.to(x.dtype)
        return plain_low_rank(x, w, a, b, bias, case.scale, factors)

    oracle = _gradients(plain, (x, t.a, t.b, t.bias), g, F64)
    plainly = _gradients(plain, (x, t.a, t.b, t.bias), g, None)
    with use("triton"), in_own_dtype():
        torch.manual_seed(0)
        got = _gradients(ours, (x, t.a, t.b, t.bias), g, None)
        torch.manual_seed(0)
        again = _gradients(ours, (x, t.a, t.b, t.bias), g, None)
    for name in oracle:
        check(got[name], plainly[name], oracle[name], what=name)
        assert torch.equal(got[name], again[name]), f"{name} differs from run to run"


def _gradients(
    op: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], g: Tensor,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:  # fmt: skip
    leaves = [
        v if v is None else (v.detach() if dtype is None else v.detach().to(dtype)).requires_grad_()
        for v in inputs
    ]
    y = op(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(y, wanted, g if dtype is None else g.to(dtype))
    return {"y": y.detach()} | dict(zip(("dx", "da", "db", "dbias"), found, strict=False))


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """wide: rows of a wider, poisoned matrix; columns: of every second column."""
    if layout == "wide":
        held = torch.full((*x.shape[:-1], x.shape[-1] + 24), torch.nan, dtype=x.dtype)
        held[..., : x.shape[-1]] = x
        return held[..., : x.shape[-1]]
    if layout == "columns":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    return x


def split_parts(m: int, n: int, k: int, r: int, bits: str, wanted: dict[str, int]) -> None:
    """Reductions that are cut in several parts are right too; ``wanted``: kernel -> at least."""
    from fastadapt.kernels import low_rank as kernels
    from fastadapt.kernels import nf4_gemm

    seen: dict[str, int] = {}
    held = {}

    def spy(module: Any, name: str, grid_axis: int) -> None:
        kernel = held[module, name] = getattr(module, name)

        class Spy:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                seen[name] = max(seen.get(name, 0), grid[grid_axis])
                return kernel[grid]

        setattr(module, name, Spy())

    for name in ("down_kernel", "up_grad_kernel", "down_grad_kernel"):
        spy(kernels, name, 1)
    for name in ("nf4_gemm_fwd_kernel", "nf4_gemm_bwd_kernel"):
        spy(nf4_gemm, name, 2)
    try:
        low_rank(LowRankCase(m=m, n=n, k=k, r=r, bits=bits, p=0.1))
    finally:
        for (module, name), kernel in held.items():
            setattr(module, name, kernel)
    for name, least in wanted.items():
        assert seen.get(name, 0) >= least, f"{name}: expected {least} parts or more, got {seen}"


LOW_RANKS: dict[str, Callable[[], None]] = {}
for _bits, (_short, _dtype), _p in itertools.product(
    ("none", "dense", "nf4", "nf4-flat", "fp4"), (("fp32", F32), ("fp16", F16)), (0.0, 0.3)
):
    _base = LowRankCase(bits=_bits, dtype=_dtype, p=_p)
    for _change in (
        {}, {"m": 0}, {"m": 1}, {"m": 3}, {"m": 65}, {"r": 1}, {"r": 5}, {"r": 64},
        {"k": 192, "n": 130}, {"k": 72}, {"m": 6, "layout": "batch"}, {"bias": False},
    ):  # fmt: skip
        if _change.get("k") == 72 and _bits not in ("none", "dense"):
            _change = {"k": 72, "n": 40}  # whole blocks, rows that begin inside one
        _case = replace(_base, **_change)
        LOW_RANKS[f"low_rank-{_case}"] = partial(low_rank, _case)
    for _x, _g in (("wide", "wide"), ("columns", "columns")):
        LOW_RANKS[f"low_rank-{_base}-{_x}"] = partial(low_rank, _base, _x, _g)
for _rank, _type in itertools.product((16, 128, 256), (F32, F16)):
    _case = LowRankCase(r=_rank, dtype=_type, p=0.3, k=128)
    LOW_RANKS[f"low_rank-{_case}"] = partial(low_rank, _case)
LOW_RANKS["low_rank-odd_k"] = partial(low_rank, LowRankCase(k=63, n=33))
LOW_RANKS["low_rank-narrow_k"] = partial(low_rank, LowRankCase(k=8, p=0.3))
for _type in (F32, F16):  # the product for few tokens, over several rounds
    _case = LowRankCase(m=16, bits="nf4", k=512, n=256, dtype=_type)
    LOW_RANKS[f"low_rank-{_case}"] = partial(low_rank, _case)
for _m in (16, 256, 257):  # the last decodes, and multiplies then
    _case = LowRankCase(m=_m, bits="nf4", k=128, n=64)
    LOW_RANKS[f"low_rank-{_case}"] = partial(low_rank, _case)

SPLITS = {
    "split-tall": partial(split_parts, 520, 48, 64, 8, "dense",
                          {"up_grad_kernel": 3, "down_grad_kernel": 3}),
    "split-wide": partial(split_parts, 17, 48, 512, 8, "dense", {"down_kernel": 8}),
    "split-gemm": partial(split_parts, 17, 64, 512, 8, "nf4",
                          {"nf4_gemm_fwd_kernel": 4, "nf4_gemm_bwd_kernel": 1, "down_kernel": 8}),
    "split-gemm_back": partial(split_parts, 3, 512, 64, 8, "nf4", {"nf4_gemm_bwd_kernel": 4}),
}  # fmt: skip


def mixed(
    bits: str, dtype: torch.dtype, p: tuple[float, ...], height: int = 3,
    index: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    """Several adapters of different ranks in one batch, in blocks of ``height`` rows."""
    from tests import test_low_rank_mixed as rows

    rows.INDEX = index or (0, 2, -1, 0, 2, 1)
    t, values, g = rows.leaves(bits, dtype, "cpu", height)
    torch.manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (3,), dtype=torch.int64)
    oracle = rows.run(rows.by_rows(t, p, seeds, F64), values, g, F64)
    plain = rows.run(rows.by_rows(t, p, seeds, dtype), values, g, dtype)
    torch.manual_seed(0)
    with use("triton"), in_own_dtype():
        got = rows.run(rows.ours(t, p, dtype), values, g, dtype)
    for name in oracle:
        check(got[name], plain[name], oracle[name], what=name)


def grouped(case: GroupCase) -> None:
    """Layers over one x, above and below the token count where their weights are decoded."""
    from tests import test_low_rank_group as group

    x, made = case.make()
    values = group.leaves_of(x, made)
    oracle = group.run(group.by_hand(case, made, F64), values, made, F64)
    plain = group.run(group.by_hand(case, made, None), values, made)
    torch.manual_seed(0)
    with use("triton"), in_own_dtype():
        got = group.run(group.ours(case, made), values, made)
    for name in oracle:
        check(got[name], plain[name], oracle[name], what=name)


_DROPS = ((48, 8, 0.3, True), (16, 1, 0.0, False), (33, 5, 0.5, True))
GROUPS = {
    f"low_rank_group-{case}": partial(grouped, case)
    for case in (
        GroupCase(), GroupCase(members=_DROPS), GroupCase(bits="nf4", dtype=F16, members=_DROPS),
        GroupCase(bits="nf4"), GroupCase(bits="nf4", m=257), GroupCase(bits="nf4-flat", m=257),
        GroupCase(bits="nf4", m=0),
    )
}  # fmt: skip


MIXES = {
    f"low_rank_mixed-{bits}-{name}-p{p[0]}": partial(mixed, bits, dtype, p)
    for bits, (name, dtype), p in itertools.product(
        ("none", "nf4"), (("fp32", F32), ("fp16", F16)), ((0.0, 0.0, 0.0), (0.3, 0.0, 0.5))
    )
}
# blocks of several tiles, whose sums are split; every row has an adapter, and none of the second
MIXES["low_rank_mixed-tall"] = partial(mixed, "none", F32, (0.3, 0.0, 0.5), 140, (0, 2, 1))
MIXES["low_rank_mixed-covered"] = partial(mixed, "none", F16, (0.0, 0.3, 0.0), 1, (0, 0, 2))
MIXES["low_rank_mixed-nobody"] = partial(mixed, "none", F32, (0.3, 0.0, 0.5), 2, (-1, -1))


# row_norm


def norm(n: int, k: int, r: int, bits: str, dtype: torch.dtype, transposed: bool = False) -> None:
    """|| W + s B A || of each row; a row that is zero has norm zero."""
    g = torch.Generator().manual_seed(n + k + r)
    w = torch.randn(n, k, generator=g) / k**0.5
    a, b = torch.randn(r, k, generator=g) / k**0.5, torch.randn(n, r, generator=g) / r**0.5
    a, b = a.to(dtype), b.to(dtype)
    if bits == "dense":
        w[n // 2], b[n // 2] = 0, 0
        w = w.to(dtype)
        held: Dense | Nf4 = Dense(w.t().contiguous().t() if transposed else w)
    else:
        held = quantised(w.to(dtype), nested=bits == "nested")
        w = decoded(held).view(n, k)
    with use("triton"):
        got = row_norm(held, a, b, 0.7)
    oracle = torch.linalg.vector_norm(w.double() + 0.7 * (b.double() @ a.double()), dim=1)
    plain = torch.linalg.vector_norm(w + 0.7 * (b @ a), dim=1)
    assert got.dtype == F32
    check(got.to(dtype), plain, oracle)
    if bits == "dense":
        assert got[n // 2] == 0


NORMS = {
    f"row_norm-{n}x{k}-r{r}-{bits}-{_short}": partial(norm, n, k, r, bits, dtype)
    for (n, k), r, bits, (_short, dtype) in itertools.product(
        ((1, 64), (65, 192), (33, 96), (16, 200)), (1, 5, 8, 64, 128),
        ("dense", "flat", "nested"), (("fp32", F32), ("fp16", F16)),
    )
}  # fmt: skip
for _shape, _bits, (_short, _dtype) in itertools.product(
    ((17, 192), (5, 96)), ("dense", "nested"), (("fp32", F32), ("fp16", F16))
):
    _name = f"row_norm-{_shape[0]}x{_shape[1]}-r384-{_bits}-{_short}"
    NORMS[_name] = partial(norm, *_shape, 384, _bits, _dtype)


def norm_cancels(bits: str, left: float) -> None:
    """Rows that the update all but undoes, among rows that it does not touch."""
    from tests import test_row_norm as rows

    rows.test_row_norm_where_w_and_the_update_cancel(bits, left, "triton", "cpu")


for _bits, _left in itertools.product(("dense", "nf4"), (1e-3, 0.0)):
    NORMS[f"row_norm-cancels-{_bits}-{_left}"] = partial(norm_cancels, _bits, _left)
NORMS["row_norm-transposed"] = partial(norm, 33, 96, 8, "dense", F32, transposed=True)


# scale


def scaled(shape: tuple[int, ...], axis: int, dtype: torch.dtype, full: bool) -> None:
    """y and the gradients of x, v, shift and rest, each within a rounding and a half of the
    reference, which sums in the same precision."""
    g = torch.Generator().manual_seed(len(shape))
    x, rest, dy = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    v, shift = (torch.randn(shape[axis], generator=g) for _ in range(2))
    values = [x.transpose(0, -1).contiguous().transpose(0, -1), v]
    values += [shift, rest] if full else []

    def found(implementation: str) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in values]
        more = dict(zip(("shift", "rest"), leaves[2:], strict=False))
        with use(implementation):
            y = scale(leaves[0], leaves[1], axis=axis, **more)
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    for got, want in zip(found("triton"), found("reference"), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if got.shape == x.shape:
            # the same sum of products, with one contraction more or less
            unit = torch.finfo(dtype).eps * 4
            assert ((got - want).abs() <= unit * (want.abs() + 1)).all()
        else:
            count = max(x.numel() // max(got.numel(), 1), 1)
            most = 16 * torch.finfo(F32).eps * count**0.5 * 4
            assert ((got - want).abs() <= most * (1 + want.abs())).all()


SCALES = {
    f"scale_{'fwd' if full else 'bwd'}-{'x'.join(map(str, shape))}-{axis}-{_short}": partial(
        scaled, shape, axis, dtype, full
    )
    for (shape, axis), full, (_short, dtype) in itertools.product(
        (((0, 5), -1), ((1, 1), -1), ((33, 130), -1), ((3, 45, 7), -1), ((2, 18, 5, 3), 1),
         ((300, 3), -1), ((3, 17, 16, 16), 1)),
        (False, True), (("fp32", F32), ("fp16", F16)),
    )
}  # fmt: skip


# rotate, reflect


def turned(
    shape: tuple[int, ...], blocks: tuple[int, int], apart: int, dtype: torch.dtype,
    layout: str = "",
) -> None:  # fmt: skip
    """y, dx and dD; alone and together."""
    g = torch.Generator().manual_seed(sum(blocks))
    count, size = blocks
    x, dy = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    d = torch.randn(count, size, size, generator=g) / size**0.5
    place = butterfly_order(shape[-1], size, apart)

    def plain(x: Tensor, d: Tensor) -> Tensor:
        whole = torch.block_diag(*d.to(x.dtype).repeat(shape[-1] // (count * size), 1, 1))
        moved = x[..., place]
        return (moved + moved @ whole)[..., place.argsort()]

    def ours(x: Tensor, d: Tensor) -> Tensor:
        y: Tensor = RotateFunction.apply(x, d, apart, dtype)
        return y

    within_budget(ours, plain, (_laid_out(x, layout), d), _laid_out(dy, layout), ("dx", "dd"))


def butterfly_order(k: int, size: int, apart: int) -> Tensor:
    """The channels of the first block, of the second, ..., by their definition."""
    half, found = size // 2, []
    for block in range(k // size):
        start = block // apart * apart * size + block % apart * half
        runs = (start, start + apart * half) if apart > 1 else ()
        found += [c for s in runs for c in range(s, s + half)]
        found += [] if runs else range(block * size, (block + 1) * size)
    return torch.tensor(found)


def reflected(m: int, k: int, r: int, dtype: torch.dtype, layout: str = "") -> None:
    """y, dx, da and db."""
    g = torch.Generator().manual_seed(m + k + r)
    x, dy = (torch.randn(m, k, generator=g).to(dtype) for _ in range(2))
    a, b = torch.randn(r, k, generator=g) / k**0.5, torch.randn(k, r, generator=g) / r**0.5

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x - x @ a.to(x.dtype).t() @ b.to(x.dtype).t()

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = ReflectFunction.apply(x, a, b, dtype)
        return y

    values = _laid_out(x, layout), a, b
    within_budget(ours, plain, values, _laid_out(dy, layout), ("dx", "da", "db"))


def within_budget(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], values: tuple[Tensor, ...],
    dy: Tensor, names: tuple[str, ...],
) -> None:  # fmt: skip
    """y and every gradient against float64; each gradient alone, and again, is the same."""

    def run(op: Callable[..., Tensor], dtype: torch.dtype | None, wanted: range) -> list[Tensor]:
        leaves = [v.detach() if dtype is None else v.detach().to(dtype) for v in values]
        needs = [leaves[i].requires_grad_() for i in wanted]
        y = op(*leaves)
        return [y.detach(), *torch.autograd.grad(y, needs, dy.to(y.dtype))]

    every = range(len(values))
    exact, near = run(plain, F64, every), run(plain, None, every)
    with use("triton"), in_own_dtype():
        got = run(ours, None, every)
        for again in (run(ours, None, every), got[:1] + [run(ours, None, every[i : i + 1])[1]
                                                          for i in every]):  # fmt: skip
            for left, right in zip(got, again, strict=True):
                assert torch.equal(left, right)
    for what, left, middle, right in zip(("y", *names), got, near, exact, strict=True):
        check(left, middle, right, what=what)


TURNS = {
    f"rotate-{'x'.join(map(str, shape))}-{count}x{size}-apart{apart}-{_short}": partial(
        turned, shape, (count, size), apart, dtype
    )
    for (shape, (count, size), apart), (_short, dtype) in itertools.product(
        (((1, 8), (1, 8), 1), ((17, 192), (6, 32), 1), ((2, 35, 96), (1, 4), 1),
         ((5, 21), (3, 7), 1), ((130, 64), (64, 1), 1), ((3, 132), (2, 66), 1),
         ((0, 64), (2, 32), 1), ((7, 96), (24, 4), 2), ((9, 192), (16, 12), 8),
         ((4, 160), (2, 80), 2)),
        (("fp32", F32), ("fp16", F16)),
    )
}  # fmt: skip
TURNS["rotate-wide"] = partial(turned, (17, 64), (2, 32), 1, F16, "wide")
TURNS["rotate-columns"] = partial(turned, (17, 64), (4, 8), 2, F32, "columns")
REFLECTS = {
    f"reflect-{m}x{k}-r{r}-{_short}": partial(reflected, m, k, r, dtype)
    for (m, k, r), (_short, dtype) in itertools.product(
        ((1, 64, 8), (17, 63, 5), (65, 192, 1), (33, 96, 64), (0, 64, 8), (7, 128, 256)),
        (("fp32", F32), ("fp16", F16)),
    )
}
REFLECTS["reflect-wide"] = partial(reflected, 17, 64, 8, F16, "wide")
REFLECTS["reflect-columns"] = partial(reflected, 17, 64, 8, F32, "columns")


# what is refused


def refused(reason: str, op: str, args: Callable[[], tuple[Any, ...]]) -> None:
    """The reason, and a KernelError with it where Triton is forced."""
    found = OPS[op].why_not("triton", *args())
    assert found is not None, "nothing is refused"
    assert reason in found, found
    with use("triton"), pytest.raises(KernelError, match=re.escape(reason)):
        OPS[op](*args())


def _forward(k: int = 64, r: int = 8, p: float = 0.0, dtype: torch.dtype = F32) -> tuple[Any, ...]:
    x, a, b = torch.zeros(3, k, dtype=dtype), torch.zeros(r, k), torch.zeros(4, r)
    return x, None, a, b, 1.0, p, torch.tensor([1]) if p else None, dtype, dtype, *flatten(None)


def _backward(k: int = 64, r: int = 8, p: float = 0.0, dtype: torch.dtype = F32) -> tuple[Any, ...]:
    x, _, a, b, scale, p, seed, kind, _, *bits = _forward(k, r, p, dtype)
    g, u = torch.zeros(3, 4, dtype=dtype), torch.zeros(3, r, dtype=dtype)
    return g, x, u, a, b, scale, p, seed, kind, True, True, True, *bits


def _norm_of(r: int = 8, dtype: torch.dtype = F32) -> tuple[Any, ...]:
    return torch.zeros(r, 64), torch.zeros(4, r), 1.0, *flatten(Dense(torch.zeros(4, 64).to(dtype)))


def _odd_norm() -> tuple[Any, ...]:
    return torch.zeros(8, 5), torch.zeros(4, 8), 1.0, *flatten(quantised(torch.randn(4, 5)))


def _wide_decode() -> tuple[Any, ...]:
    return *quantised(torch.randn(4, 64)), F64


REFUSED = {
    f"refused-{name}": partial(refused, reason, op, args)
    for name, reason, op, args in (
        ("fwd-k", "k=63 is not a multiple of 8", "low_rank_fwd", partial(_forward, k=63, p=0.1)),
        ("bwd-k", "k=63 is not a multiple of 8", "low_rank_bwd", partial(_backward, k=63, p=0.1)),
        ("fwd-r", "r=257 is more than 256", "low_rank_fwd", partial(_forward, r=257)),
        ("bwd-r", "r=257 is more than 256", "low_rank_bwd", partial(_backward, r=257)),
        ("fwd-f64", "x is torch.float64", "low_rank_fwd", partial(_forward, dtype=F64)),
        ("bwd-f64", "x is torch.float64", "low_rank_bwd", partial(_backward, dtype=F64)),
        ("dropout-f64", "x is float64", "dropout",
         lambda: (torch.zeros(8, dtype=F64), torch.tensor([1]), 0.5, F64)),
        ("scale-f64", "x is torch.float64", "scale_fwd",
         lambda: (torch.zeros(2, 3, dtype=F64), torch.zeros(3), None, None, 1)),
        ("rotate-f64", "d is torch.float64", "rotate_fwd",
         lambda: (torch.zeros(2, 4), torch.zeros(1, 4, 4, dtype=F64), 1, F32)),
        ("rotate_bwd-f64", "g is torch.float64", "rotate_bwd",
         lambda: (torch.zeros(2, 4, dtype=F64), torch.zeros(2, 4), torch.zeros(1, 4, 4), 1, True,
                  True)),
        ("reflect-r", "r=257 is more than 256", "reflect_fwd",
         lambda: (torch.zeros(2, 4), torch.zeros(257, 4), torch.zeros(4, 257), F32)),
        ("reflect_bwd-f64", "x is torch.float64", "reflect_bwd",
         lambda: (torch.zeros(2, 4, dtype=F64),) * 2 + (torch.zeros(2, 1), torch.zeros(1, 4),
                  torch.zeros(4, 1), True, True, True)),
        ("row_norm-f64", "W is torch.float64", "row_norm", partial(_norm_of, dtype=F64)),
        ("row_norm-odd", "k=5 is odd", "row_norm", _odd_norm),
        ("decode-f64", "as torch.float64", "nf4_dequant", _wide_decode),
    )
}  # fmt: skip


def poison() -> None:
    """A guard of the other cases: what nobody wrote reads as NaN."""
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1, dtype=F16).new_empty((2, 3), dtype=F32).isnan().all()


CASES: dict[str, Callable[[], None]] = {
    "poison": poison,
    **DECODES,
    "decode-two_levels": decode_two_levels,
    "decode-misaligned": decode_misaligned,
    "decode-pairs": partial(pairs, True),
    "decode-pairs_back": partial(pairs, False),
    **DROPS,
    "dropout-strided": drop_strided,
    **LOW_RANKS,
    **GROUPED,
    **GROUPS,
    **MIXES,
    **SPLITS,
    **NORMS,
    **SCALES,
    **TURNS,
    **REFLECTS,
    **REFUSED,
}


SPREAD = {
    "poison",
    *(f"decode-{n}x{k}-nf4{nested}-64-{short}" for n, k in DECODE_SHAPES
      for nested in ("", "-nested") for short in ("fp32", "fp16")),
    "decode-5x192-fp4-nested-64-fp32", "decode-130x64-nf4-nested-128-fp16", "decode-two_levels",
    "decode-misaligned", *GROUPED, *GROUPS, "decode-pairs", "decode-pairs_back", "dropout-strided",
    *(name for name in DROPS if "-p0.5-" in name),
    *(f"low_rank-{LowRankCase(bits=bits, dtype=dtype, p=0.3)}"
      for bits in ("none", "dense", "nf4", "nf4-flat", "fp4") for dtype in (F32, F16)),
    *(f"low_rank-{LowRankCase(bits=bits, **sizes)}" for bits in ("dense", "nf4")
      for sizes in ({}, {"m": 0}, {"m": 1}, {"m": 3, "p": 0.3}, {"m": 65, "p": 0.3}, {"r": 1},
                    {"r": 5}, {"r": 64, "p": 0.3}, {"m": 6, "layout": "batch"}, {"bias": False},
                    {"k": 192, "n": 130})),
    *(f"low_rank-{LowRankCase(bits=bits)}-{layout}" for bits in ("dense", "nf4")
      for layout in ("wide", "columns")),
    f"low_rank-{LowRankCase(bits='dense', k=72, p=0.3)}",
    f"low_rank-{LowRankCase(bits='nf4', k=72, n=40)}",
    f"low_rank-{LowRankCase(r=256, dtype=F16, p=0.3, k=128)}",
    f"low_rank-{LowRankCase(m=16, bits='nf4', k=512, n=256, dtype=F16)}",
    "low_rank-odd_k", "low_rank-narrow_k",
    *SPLITS,
    *(name for name in MIXES if not name.endswith("p0.0")),
    *(f"row_norm-{shape}-r8-{bits}-{short}" for shape in ("65x192", "33x96", "16x200")
      for bits in ("dense", "flat", "nested") for short in ("fp32", "fp16")),
    "row_norm-1x64-r5-nested-fp32", "row_norm-65x192-r1-dense-fp32",
    "row_norm-65x192-r128-nested-fp16", "row_norm-transposed",
    "row_norm-17x192-r384-nested-fp32", "row_norm-5x96-r384-dense-fp16",
    "row_norm-cancels-dense-0.0", "row_norm-cancels-nf4-0.001",
    *(name for name in SCALES if "300" not in name and "16x16" not in name),
    *(name for name in TURNS if "-35x" not in name),
    *(name for name in REFLECTS if "r64" not in name),
    *REFUSED,
}  # fmt: skip
"""Each kernel and each of its branches once: what a default run does, the rest is slow."""


def main(ids: list[str]) -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("expected TRITON_INTERPRET=1 in the environment")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN
    wrong: dict[str, str | None] = {}
    for name in ids or CASES:
        try:
            CASES[name]()
            wrong[name] = None
        except Exception:
            wrong[name] = traceback.format_exc(limit=-6)
    json.dump(wrong, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
