# SPDX-License-Identifier: Apache-2.0
"""The 4-bit decoder gives the bits of bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastadapt.errors import KernelError
from fastadapt.ops import dispatch
from fastadapt.ops.low_rank import low_rank
from fastadapt.ops.nf4 import nf4_dequant
from fastadapt.testing import decoded, moved, quantised

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("poisoned")

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 49}, "expected packed uint8 of 1568 bytes for W \\(49, 64\\), got .* of 1536"),
        ({"packed": torch.zeros(1536)}, "got torch.float32 of 1536"),
        ({"blocksize": 0}, "expected a blocksize above 0, got 0"),
        ({"blocksize": 32}, "expected absmax of 96 blocks, got 48"),
        ({"code": torch.zeros(15)}, "expected a codebook of 16 values, got 15"),
        ({"offset": None}, "with nested_absmax, got not all"),
        ({"nested_blocksize": 16}, "nested_absmax of 3, got 256 and 1"),
        ({"nested_code": torch.zeros(255)}, "expected nested_code of 256 values"),
    ],
)
def test_a_weight_that_is_not_whole_is_refused(change: dict[str, Any], message: str) -> None:
    """By the decoder and by the product: a kernel would read what is not there."""
    bits = quantised(torch.randn(48, 64))
    wrong = bits._replace(**change)
    with pytest.raises(KernelError, match=f"nf4_dequant: .*{message}"):
        nf4_dequant(wrong)
    x, a, b = torch.zeros(2, 64), torch.zeros(4, 64), torch.zeros(wrong.n, 4)
    with pytest.raises(KernelError, match=f"low_rank: .*{message}"):
        low_rank(x, a, b, 1.0, bits=wrong, compute=F32, out=F32)


def test_tensors_on_two_devices_are_refused() -> None:
    x, a, b = torch.zeros(2, 64, device="meta"), torch.zeros(4, 64), torch.zeros(48, 4)
    with pytest.raises(KernelError, match="on x's device meta, got \\['cpu', 'cpu'\\]: move"):
        low_rank(x, a, b, 1.0, compute=F32, out=F32)
