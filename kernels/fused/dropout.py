# SPDX-License-Identifier: Apache-2.0
"""y = x * keep(seed) / (1 - p), one pass, no mask in memory. Products in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import why_not_here
from .philox import keep_lanes

LAUNCH = {"BLOCK": 2048, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


@triton.jit
def dropout_fwd_kernel(x, seed, y, numel, threshold, scale, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    group = start // 8 + tl.arange(0, BLOCK // 8)
    keep = tl.reshape(keep_lanes(tl.load(seed), group, threshold), (BLOCK,))
    i = start + tl.arange(0, BLOCK)
    inside = i < numel
    value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i, (value * tl.where(keep, scale, 0.0)).to(y.dtype.element_ty), mask=inside)


def dropout(x: Tensor, seed: Tensor, p: float, out_dtype: torch.dtype) -> Tensor:
    """x: any shape -> the same, in ``out_dtype``; seed: int64 (1,) on the same device."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=out_dtype)
    threshold = round(p * 65536)
    if x.numel():
        dropout_fwd_kernel[(triton.cdiv(x.numel(), LAUNCH["BLOCK"]),)](
            x, seed, y, x.numel(), threshold, 65536 / (65536 - threshold), **LAUNCH
        )
    return y


def why_not_dropout(x: Tensor, *_: object) -> str | None:
    if x.dtype == torch.float64:
        return "x is float64"
    return why_not_here(x.device)
