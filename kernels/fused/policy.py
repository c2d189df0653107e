# SPDX-License-Identifier: Apache-2.0
"""Which of two ways multiplies by a 4-bit weight: the fused product (decoded in registers), or
decode once and let cuBLAS add the product to what is there (beta = 1).

Decoding to memory costs c / m of the product's time, c = 1.26 P / B for P FLOP/s and B bytes/s, so
that a fused product at a fraction e of cuBLAS's speed wins below m = c / (1 / e - 1) tokens.
FASTADAPT_NF4_PRODUCT=auto|fused|decoded forces one; a forced one runs or raises KernelError.
"""

from __future__ import annotations

import os

import torch

from fastadapt.errors import ConfigError, KernelError

from .nf4 import TL_DTYPE
from .tiles import GEMM_BLOCK

MAX_TOKENS = {80: 128, 86: 128, 89: 256, 90: 256, 100: 32, 120: 256}
"""sm -> the most tokens that the fused product is chosen for. None of these is measured with these
kernels yet. Hopper: computed, c = 231 on an H200, e = 0.5. The others are where bitsandbytes' fused
kernel, of the same structure, stops on that family (its ladder of 0.50); on sm_80 and sm_86 the
64-token tile also takes 11.3 to 13.6 instructions a weight, on sm_90 7.4 to 7.7 (docs/kernels.md);
sm_100's tensor cores outrun any decoding soonest. Newer families take the row below them."""
ELSEWHERE = 128
"""Of a GPU that is not NVIDIA's: the lowest figure of a family with tensor cores of that speed."""


def max_tokens(device: torch.device) -> int:
    """The most tokens that ``auto`` takes the fused product for on this device."""
    if device.type != "cuda":
        return MAX_TOKENS[90]  # the interpreter, which stands in for Hopper
    if torch.version.hip is not None:
        return ELSEWHERE
    major, minor = torch.cuda.get_device_capability(device)
    older = [sm for sm in MAX_TOKENS if sm <= 10 * major + minor]
    return MAX_TOKENS[max(older)] if older else 0


def wanted() -> str:
    """What FASTADAPT_NF4_PRODUCT says; ConfigError for anything else."""
    name = os.environ.get("FASTADAPT_NF4_PRODUCT", "auto")
    if name not in ("auto", "fused", "decoded"):
        raise ConfigError(f"FASTADAPT_NF4_PRODUCT must be auto, fused or decoded, got {name!r}")
    return name


def why_not_fused(k: int, blocksize: int, stored: torch.dtype, dtype: torch.dtype) -> str | None:
    """Why the fused product cannot run. stored: dtype of the weight; dtype: of the product."""
    if k % GEMM_BLOCK or blocksize % GEMM_BLOCK:
        return f"k={k} and the quantisation block {blocksize} must be multiples of {GEMM_BLOCK}"
    if dtype not in TL_DTYPE:
        return f"the product is {dtype}"
    if stored not in (dtype, torch.float32):
        return f"W decodes to {stored} and would be rounded twice on its way to {dtype}"
    return None


def fused(
    m: int, k: int, blocksize: int, stored: torch.dtype, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a product of m tokens is the fused one; KernelError where it is forced and cannot."""
    name = wanted()
    if name == "decoded" or m == 0:
        return False
    reason = why_not_fused(k, blocksize, stored, dtype)
    if name == "fused" and reason is not None:
        raise KernelError(
            f"FASTADAPT_NF4_PRODUCT: 'fused' was forced and cannot run: {reason}; use auto"
        )
    return reason is None and (name == "fused" or m <= max_tokens(device))
