# SPDX-License-Identifier: Apache-2.0
"""The 4-bit decoder gives the bits of bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from fastadapt.ops import dispatch
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
