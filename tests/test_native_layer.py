# SPDX-License-Identifier: Apache-2.0
"""The adapted layer in one native call each way: against float64, at odd sizes, from any layout,
with any number of threads and any instruction set that the CPU has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.ops import native
from fastadapt.ops.dropout import keep_mask, threshold
from tests.test_native import assert_same_bits, decoded, name, quantised

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [d for d, least in ((F32, native.AVX512), (BF16, native.AVX512_BF16))
          if native.isa() >= least]  # fmt: skip
pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not DTYPES, reason="this CPU has no AVX-512, or no extension is built"),
]
KINDS = ["nf4", "dense", "turned", "int8", "none"]
# (m, n, k, r): one of everything, odd, blocks cut by threads, tokens in several parts, wide ranks
SIZES = [(1, 1, 64, 1), (3, 65, 128, 16), (7, 33, 192, 5), (33, 130, 64, 17), (131, 97, 320, 8),
         (1030, 5, 64, 3), (2, 3, 64, 70), (40, 200, 576, 250)]  # fmt: skip


ALL = (True, True, True)


class Layer:
    """Random tensors of one layer; ``bits`` in the order of ``flatten``, w what they mean."""

    def __init__(self, kind: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        m, n, k, r = size
        torch.manual_seed(m + n)
        self.x, self.g = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        self.a, self.b = torch.randn(r, k) / k**0.5, torch.randn(n, r)
        self.bias = torch.randn(n).to(dtype)
        nothing = (None,) * 5
        self.w = torch.zeros(n, k)
        self.bits: tuple[Any, ...] = (None, *nothing, 0, 0, n, k, F32)
        if kind == "nf4":
            bits = quantised(n * k, 64, nested=True, seed=n)
            self.bits = (*bits, n, k, dtype)
            self.w = decoded(bits, n * k, dtype, F32).view(n, k)
        elif kind == "int8":
            codes, rows = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n)
            self.bits = (codes, rows, *(None,) * 4, 0, 0, n, k, dtype)
            self.w = (codes.float() * (rows[:, None] / 127)).to(dtype)
        elif kind != "none":
            w = (torch.randn(n, k) / k**0.5).to(dtype)
            self.w = w.t().contiguous().t() if kind == "turned" else w
            self.bits = (self.w, *nothing, 0, 0, n, k, dtype)

    def run(
        self, p: float = 0.0, needs: tuple[bool, bool, bool] = (True,) * 3
    ) -> dict[str, Tensor]:
        seed = torch.tensor([77]) if p else None
        y, u = native.low_rank_fwd(self.x, self.bias, self.a, self.b, 1.7, p, seed, *self.bits)
        dx, da, db = native.low_rank_bwd(
            self.g, self.x, u, self.a, self.b, 1.7, p, seed, *needs, *self.bits
        )
        return {"y": y, "u": u, "dx": dx, "da": da, "db": db}

    def exact(self, p: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Each result in float64, and the sum of the absolute values of its terms."""
        x, g, w, a, b = (t.double() for t in (self.x, self.g, self.w, self.a, self.b))
        drop = torch.ones_like(x)
        if p:
            drop = keep_mask(torch.tensor([77]), x.numel(), p).view(x.shape).double()
            drop *= 65536 / (65536 - threshold(p))

        def both(signed: Any) -> tuple[Tensor, Tensor]:
            return signed(x, g, w, a, b), signed(x.abs(), g.abs(), w.abs(), a.abs(), b.abs())

        found = {
            "y": both(lambda x, g, w, a, b: x @ w.t() + 1.7 * (x * drop) @ a.t() @ b.t()),
            "u": both(lambda x, g, w, a, b: (x * drop) @ a.t()),
            "dx": both(lambda x, g, w, a, b: g @ w + 1.7 * (g @ b @ a) * drop),
            "da": both(lambda x, g, w, a, b: 1.7 * (g @ b).t() @ (x * drop)),
            "db": both(lambda x, g, w, a, b: 1.7 * g.t() @ ((x * drop) @ a.t())),
        }
        y, total = found["y"]
        found["y"] = y + self.bias.double(), total + self.bias.double().abs()
        return found


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_each_result_is_within_the_bound_of_its_terms(
    dtype: torch.dtype, kind: str, size: tuple[int, int, int, int], p: float
) -> None:
    """In fp32 every term may lose an ulp for each addition after it; in bf16 A, B, u and du are
    rounded once before they are multiplied, and each result once."""
    layer = Layer(kind, size, dtype)
    got = layer.run(p)
    terms = sum(size)
    unit = terms * 2**-24 + (6 * 2**-9 if dtype == BF16 else 0)
    for key, (value, total) in layer.exact(p).items():
        assert got[key].shape == value.shape
        assert ((got[key].double() - value).abs() <= unit * total).all(), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, kind: str) -> None:
    before = torch.get_num_threads()
    try:
        for size in ((130, 514, 832, 16), (5, 96, 1600, 4)):
            layer, results = Layer(kind, size, dtype), []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(layer.run(0.2))
            for other in results[1:]:
                for key, value in results[0].items():
                    assert_same_bits(other[key], value)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_layouts_and_shapes_of_x_do_not_matter(dtype: torch.dtype) -> None:
    layer = Layer("nf4", (12, 70, 128, 8), dtype)
    want = layer.run(0.3)
    room = torch.full((12 * 128 + 7,), 3.0, dtype=dtype)
    odd = room[3 : 3 + 12 * 128].view(12, 128).copy_(layer.x)
    for x in (odd, layer.x.t().contiguous().t(), layer.x.repeat(1, 2)[:, :128]):
        layer.x = x
        for key, value in layer.run(0.3).items():
            assert_same_bits(value, want[key])
    layer.x, layer.g = layer.x.reshape(3, 4, 128), layer.g.view(3, 4, 70)
    got = layer.run(0.3)
    assert got["y"].shape == (3, 4, 70)
    assert got["dx"].shape == (3, 4, 128)
    for key, value in got.items():
        assert_same_bits(value.view(want[key].shape), want[key])


@pytest.mark.parametrize(
    "needs", [(False, True, False), (True, False, False), (False, False, True)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_what_is_not_needed_is_not_made(dtype: torch.dtype, needs: tuple[bool, bool, bool]) -> None:
    layer = Layer("nf4", (9, 70, 128, 8), dtype)
    want, got = layer.run(0.3), layer.run(0.3, needs)
    for key, needed in zip(("dx", "da", "db"), needs, strict=True):
        if needed:
            assert_same_bits(got[key], want[key])
        else:
            assert got[key].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_no_tokens_give_empty_outputs_and_zero_gradients(dtype: torch.dtype) -> None:
    got = Layer("nf4", (0, 70, 128, 8), dtype).run(0.3)
    assert got["y"].shape == (0, 70)
    assert not got["da"].any()
    assert not got["db"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_value_that_is_not_finite_stays_in_its_token(dtype: torch.dtype) -> None:
    layer = Layer("nf4", (7, 33, 64, 5), dtype)
    want = layer.run()
    layer.x[3, 5], layer.g[3, 2] = float("nan"), float("inf")
    got = layer.run()
    others = [0, 1, 2, 4, 5, 6]
    for key in ("y", "u", "dx"):
        assert_same_bits(got[key][others], want[key][others])
        assert not got[key][3].isfinite().any()


def test_it_refuses_what_does_not_fit() -> None:
    layer = Layer("nf4", (2, 33, 64, 5), DTYPES[0])
    for field, value, message in (
        ("a", torch.zeros(5, 63), "a must have 320 elements, got 315"),
        ("b", torch.zeros(33, 4), "b must have 132 elements|b must have 165 elements"),
        ("bias", torch.zeros(32), "bias must have 33 elements, got 32"),
        ("x", torch.zeros(2, 64, dtype=torch.float64), "x must be float32 or bfloat16"),
    ):
        whole = getattr(layer, field)
        setattr(layer, field, value)
        with pytest.raises(RuntimeError, match=message):
            layer.run()
        setattr(layer, field, whole)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_lesser_cpus_pass_the_tests_of_the_native_ops(isa: str) -> None:
    """FASTADAPT_ISA stands in for them."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "native",
         "tests/test_native.py", "tests/test_native_layer.py", "tests/test_low_rank.py",
         "-m", "not slow and not gpu"],
        cwd=Path(__file__).resolve().parents[1], env={**os.environ, "FASTADAPT_ISA": isa},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
