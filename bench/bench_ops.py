# SPDX-License-Identifier: Apache-2.0
"""What one op costs: pytest-benchmark cases, one group a question.

    python -m pytest bench/bench_ops.py --benchmark-json x.json -k GROUP
    DEVICE=cpu QUICK=1 python -m pytest bench/bench_ops.py     a rehearsal, whose times mean nothing

A call ends when the device has finished. ``extra_info`` has the bytes and operations that a call
cannot do without, so that GB/s and TFLOP/s follow from the time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from weights import QUICK, random_nf4

from fastadapt.errors import KernelError
from fastadapt.ops.dispatch import use
from fastadapt.ops.low_rank import low_rank
from fastadapt.ops.nf4 import nf4_dequant
from fastadapt.ops.row_norm import row_norm

DEVICE = torch.device(os.environ.get("DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
SHORT = os.environ.get("QUICK") == "1"
BF16 = torch.bfloat16
IMPLEMENTATIONS = ("auto", "triton", "native", "reference")
TOKENS = (3, 16) if SHORT else (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FEW = (3, 16) if SHORT else (1, 4, 16, 128, 256, 512)
WIDE = [QUICK["q"]] if SHORT else [(4096, 4096), (14336, 4096)]


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., None]:
    def run(call: Callable[[], Any], **extra: float) -> None:
        def done() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info.update(extra)
        benchmark.pedantic(done, rounds=2 if SHORT else 30, warmup_rounds=1 if SHORT else 5)

    return run


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(BF16)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.benchmark(group="beta")
def test_beta(beta: int, m: int, timed: Callable[..., None]) -> None:
    """Does the C read of cuBLAS hide under the product?"""
    n, k = WIDE[0]
    x, w, y = random(m, k), random(n, k).t(), random(m, n)
    timed(lambda: torch.addmm(y, x, w, beta=beta, out=y) if beta else torch.mm(x, w, out=y),
          flop=2 * m * n * k)  # fmt: skip


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("what", ["both", "gemm"])
@pytest.mark.benchmark(group="dequant_gemm")
def test_dequant_gemm(what: str, m: int, timed: Callable[..., None]) -> None:
    """Decode, then multiply, against the product of a weight decoded before: what L2 gives back."""
    n, k = WIDE[0]
    x, bits = random(m, k), random_nf4(n, k, DEVICE, BF16)
    w = nf4_dequant(bits)
    call = (lambda: x @ nf4_dequant(bits).t()) if what == "both" else (lambda: x @ w.t())
    timed(call, flop=2 * m * n * k)


@pytest.mark.parametrize("size", WIDE, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.benchmark(group="dequant")
def test_dequant(implementation: str, size: tuple[int, int], timed: Callable[..., None]) -> None:
    n, k = size
    bits = random_nf4(n, k, DEVICE, BF16)
    with use(implementation), or_skip():
        nf4_dequant(bits)
        timed(lambda: nf4_dequant(bits), bytes=n * k * (0.5 + 1 / 64 + 2))


@pytest.mark.parametrize("table", ["exact", "pair"])
@pytest.mark.parametrize("m", FEW)
@pytest.mark.parametrize("transposed", [True, False], ids=["fwd", "dx"])
@pytest.mark.benchmark(group="fused")
def test_fused(
    transposed: bool, m: int, table: str, timed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The fused NF4 product; its fraction of cuBLAS is against ``gemm`` of dequant_gemm."""
    if DEVICE.type != "cuda":
        pytest.skip("the fused product is a Triton kernel: needs a GPU")
    from fastadapt.kernels.nf4_gemm import add_product

    monkeypatch.setenv("FASTADAPT_NF4_TABLE", table)
    n, k = WIDE[0]
    bits = random_nf4(n, k, DEVICE, BF16)
    x, y = random(m, k if transposed else n), random(m, n if transposed else k)
    timed(lambda: add_product(y, x, *bits, transposed=transposed),
          flop=2 * m * n * k, bytes=n * k * (0.5 + 1 / 64))  # fmt: skip


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.benchmark(group="auto")
def test_auto(implementation: str, m: int, timed: Callable[..., None]) -> None:
    """Forward and backward of one layer: auto must be the best of the others."""
    n, k = WIDE[0]
    bits = random_nf4(n, k, DEVICE, BF16)
    x, a, b = (random(*s).requires_grad_() for s in ((m, k), (16, k), (n, 16)))
    g = random(m, n)

    def step() -> None:
        y = low_rank(x, a, b, 2.0, bits=bits, p=0.05, compute=BF16, out=BF16)
        torch.autograd.grad(y, (x, a, b), g)

    with use(implementation), or_skip():
        step()
        timed(step, flop=4 * m * n * k)


@pytest.mark.parametrize("r", [4, 16] if SHORT else [16, 384])
@pytest.mark.parametrize("size", WIDE, ids=str)
@pytest.mark.parametrize("how", ["ours", "nf4", "PEFT's"])
@pytest.mark.benchmark(group="row_norm")
def test_row_norm(how: str, size: tuple[int, int], r: int, timed: Callable[..., None]) -> None:
    """|| W + s B A ||, against materialising B A as PEFT does (through an identity matrix)."""
    from fastadapt.ops.bits import Dense

    (n, k), scale = size, 0.5
    w, a, b = random(n, k), random(r, k), random(n, r)
    bits = random_nf4(n, k, DEVICE, BF16) if how == "nf4" else Dense(w)

    def by_hand() -> torch.Tensor:
        delta = (torch.eye(k, device=DEVICE, dtype=BF16) @ a.t() @ b.t()).t()
        return torch.linalg.norm(w + scale * delta, dim=1)

    timed(by_hand if how == "PEFT's" else lambda: row_norm(bits, a, b, scale), bytes=n * k * 2)


class or_skip:
    """An implementation that cannot run here is not timed; the reason is in the report."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, KernelError):
            pytest.skip(str(error))
