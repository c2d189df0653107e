# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: bf16 kernels against float64, a training step in a CUDA graph,
compiled and chosen by itself. The same bodies rehearse on a CPU, where the reference serves;
weights are made without bitsandbytes, which such a machine may lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.ops import dispatch
from fastadapt.ops.bits import Nf4
from fastadapt.ops.dropout import draw_seed, dropout_fwd, dropout_reference
from fastadapt.ops.low_rank import low_rank
from fastadapt.ops.nf4 import nf4_dequant, nf4_dequant_reference
from fastadapt.ops.row_norm import row_norm
from fastadapt.testing import check

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu")]
on_devices = pytest.mark.parametrize("device", DEVICES)
DTYPES = [BF16, torch.float16, F32]


def weight(n: int, k: int, device: str, dtype: torch.dtype, *, nested: bool = True) -> Nf4:
    """Any 4-bit weight is a valid one: random codes, random scales."""
    g = torch.Generator().manual_seed(n * k)
    blocks = -(-n * k // 64)
    packed = torch.randint(0, 256, (-(-n * k // 2),), generator=g, dtype=torch.uint8)
    code = torch.linspace(-1, 1, 16)
    size = 1 / k**0.5
    if not nested:
        scale = (torch.rand(blocks, generator=g) + 0.5) * size
        plain = Nf4(packed, scale, code, None, None, None, 64, 0, n, k, dtype)
        return Nf4(*(v.to(device) if isinstance(v, Tensor) else v for v in plain))
    found = Nf4(
        packed, torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8), code,
        torch.rand(-(-blocks // 256), generator=g) * size, torch.linspace(-0.5, 1, 256),
        torch.tensor(size), 64, 256, n, k, dtype,
    )  # fmt: skip
    return Nf4(*(v.to(device) if isinstance(v, Tensor) else v for v in found))


def implementation(device: str) -> str:
    return "triton" if device == "cuda" else "reference"


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("size", [(1, 64), (3, 5), (130, 64), (257, 192)], ids=str)
def test_decode_has_the_bits_of_the_reference(
    size: tuple[int, int], nested: bool, dtype: torch.dtype, device: str
) -> None:
    bits = weight(*size, device, dtype, nested=nested)
    with dispatch.use(implementation(device)):
        got, wide = nf4_dequant(bits), nf4_dequant(bits, F32)
    want = nf4_dequant_reference(*(v.cpu() if isinstance(v, Tensor) else v for v in bits), dtype)
    assert torch.equal(got.cpu(), want)
    assert torch.equal(wide.cpu(), want.float())


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 2047, 4099])
def test_dropout_has_the_bits_of_the_reference(numel: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    seed = torch.tensor([77 << 40])
    with dispatch.use(implementation(device)):
        got = dropout_fwd(x.to(device), seed.to(device), 0.3, dtype)
    assert torch.equal(got.cpu(), dropout_reference(x, seed, 0.3, dtype))


CASES = [
    (m, k, n, r, p)
    for m in (1, 3, 17, 256, 257)
    for k, n, r, p in ((64, 48, 8, 0.0), (192, 130, 5, 0.3), (128, 256, 64, 0.05))
]


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_low_rank_is_within_the_budget(
    case: tuple[int, int, int, int, float], dtype: torch.dtype, device: str
) -> None:
    """y and every gradient against float64: twice what plain PyTorch errs in the same dtype. Over
    four draws together, since da of one token has but r errors of du in it, and the largest of so
    few says little."""
    m, k, n, r, p = case
    held = weight(n, k, device, dtype)
    runs: dict[str, list[list[Tensor]]] = {"oracle": [], "plain": [], "got": []}
    for draw in range(4):
        g = torch.Generator().manual_seed(4 * (m + k) + draw)
        shapes = ((m, k), (r, k), (n, r), (n,))
        leaves = [(torch.randn(s, generator=g) / s[-1] ** 0.5).to(device, dtype) for s in shapes]
        grad = torch.randn(m, n, generator=g).to(device, dtype)
        for name, kind in (("oracle", F64), ("plain", dtype), ("got", dtype)):
            torch.manual_seed(draw)
            xs = [leaf.to(kind).requires_grad_() for leaf in leaves]
            with dispatch.use(implementation(device) if name == "got" else "reference"):
                if name == "got":
                    y = low_rank(*xs[:3], 1.7, bits=held, bias=xs[3], p=p, compute=dtype, out=dtype)
                else:
                    y = by_hand(*xs, nf4_dequant(held).to(kind), p)
                found = torch.autograd.grad(y, xs, grad.to(kind))
            runs[name].append([y.detach(), *found])
    for i, name in enumerate(("y", "dx", "da", "db", "dbias")):
        got, plain, oracle = (
            torch.stack([run[i] for run in runs[k]]) for k in ("got", "plain", "oracle")
        )
        check(got, plain, oracle, what=name)


def by_hand(x: Tensor, a: Tensor, b: Tensor, bias: Tensor, w: Tensor, p: float) -> Tensor:
    seed = draw_seed(x.device) if p else None
    ones = torch.ones_like(x)
    factors = ones if seed is None else dropout_reference(ones.float(), seed, p, F32).to(x.dtype)
    return x @ w.t() + 1.7 * ((x * factors) @ a.t() @ b.t()) + bias


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 64, 1), (65, 192, 8), (33, 256, 128)], ids=str)
def test_row_norm_is_within_the_budget(
    size: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    n, k, r = size
    bits = weight(n, k, device, dtype)
    g = torch.Generator().manual_seed(n)
    a, b = ((torch.randn(s, generator=g) / s[1] ** 0.5).to(device, dtype) for s in ((r, k), (n, r)))
    with dispatch.use(implementation(device)):
        got = row_norm(bits, a, b, 0.7)
    w = nf4_dequant(bits)
    exact = torch.linalg.vector_norm(w.double() + 0.7 * (b.double() @ a.double()), dim=1)
    check(got.to(dtype), torch.linalg.vector_norm(w + 0.7 * (b @ a), dim=1), exact)


def training(device: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A step of SGD on two NF4 layers with dropout, in static buffers; what it trains."""
    torch.manual_seed(4)
    first, second = weight(96, 64, device, BF16), weight(64, 96, device, BF16)
    x = torch.randn(17, 64, device=device).to(BF16)
    shapes = ((8, 64), (96, 8), (8, 96), (64, 8))
    trained = [(torch.randn(s, device=device) / 8).requires_grad_() for s in shapes]

    def step() -> Tensor:
        a, b, c, d = (t.to(BF16) for t in trained)
        h = low_rank(x, a, b, 0.5, bits=first, p=0.1, compute=BF16, out=BF16)
        y = low_rank(h.relu(), c, d, 0.5, bits=second, p=0.1, compute=BF16, out=BF16)
        loss = (y.float() - x.float()).square().mean()
        with torch.no_grad():
            for t, dt in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                t.sub_(dt, alpha=0.1)
        return loss.detach()

    return step, trained


@on_devices
def test_a_training_step_learns_and_a_graph_replays_it(device: str) -> None:
    """On a GPU the step is captured whole: nothing in it may wait for the host. Each replay draws a
    new mask, so losses differ, and they fall."""
    step, trained = training(device)
    before = [t.detach().clone() for t in trained]
    if device == "cpu":
        losses = [float(step()) for _ in range(30)]
    else:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        losses = []
        for _ in range(30):
            graph.replay()
            losses.append(float(loss))
    assert len(set(losses)) > 25
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all((t - was).abs().max() > 0 for t, was in zip(trained, before, strict=True))


@pytest.mark.gpu
def test_a_step_compiles_without_a_break() -> None:
    bits = weight(96, 64, "cuda", BF16)
    x, a, b = (torch.randn(s, device="cuda").to(BF16) for s in ((17, 64), (8, 64), (96, 8)))

    def op(*xs: Tensor) -> Tensor:
        return low_rank(*xs, 0.5, bits=bits, compute=BF16, out=BF16).relu()

    runs: list[list[Any]] = []
    for call in (op, torch.compile(op, fullgraph=True)):
        leaves = [v.clone().requires_grad_() for v in (x, a, b)]
        y = call(*leaves)
        runs.append([y.detach(), *torch.autograd.grad(y.float().sum(), leaves)])
    for eager, compiled in zip(*runs, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.gpu
def test_triton_is_chosen_on_a_gpu() -> None:
    op = dispatch.OPS["nf4_dequant"]
    assert op.choose(*weight(96, 64, "cuda", BF16), BF16) == "triton"
