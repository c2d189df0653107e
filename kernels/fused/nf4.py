# SPDX-License-Identifier: Apache-2.0
"""Decode a 4-bit weight, nested absmax included, in one kernel; bit for bit bitsandbytes' values.

A 16-entry table lives in registers and is read by ``tl.gather`` (8.0 instructions an element on
sm_90, a tree of selects takes 17). The scale of an absmax is rounded before the offset is added,
so multiply-add fusion is off.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import why_not_here

_BLOCK = 1024


@triton.jit
def scale_of(
    block, inside, absmax, nested_absmax, nested_code, offset,
    NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """The fp32 scale of the quantisation block ``block``."""
    if NESTED_BLOCK == 0:
        return tl.load(absmax + block, mask=inside, other=0.0)
    index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    coarse = tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside, other=0.0)
    return tl.load(nested_code + index) * coarse + tl.load(offset)


@triton.jit
def decode_bytes(byte, table):
    """byte: int32 (..., B) -> fp32 (..., 2 B): the even element is in the high nibble."""
    flat = tl.reshape(byte, (byte.numel,))
    high = tl.reshape(tl.gather(table, flat >> 4, 0), byte.shape)
    low = tl.reshape(tl.gather(table, flat & 15, 0), byte.shape)
    return high, low


@triton.jit
def nf4_dequant_kernel(
    packed, absmax, code, nested_absmax, nested_code, offset, out, numel,
    QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    inside = 2 * i < numel
    table = tl.load(code + tl.arange(0, 16))
    byte = tl.load(packed + i, mask=inside, other=0).to(tl.int32)
    scale = scale_of(
        2 * i // QBLOCK, inside, absmax, nested_absmax, nested_code, offset, NESTED_BLOCK
    )
    high, low = decode_bytes(byte, table)
    value = tl.interleave(high * scale, low * scale).to(ROUND).to(out.dtype.element_ty)
    j = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(out + j, value, mask=j < numel)


TL_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def nf4_dequant(
    packed: Tensor, absmax: Tensor, code: Tensor, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, blocksize: int, nested_blocksize: int,
    n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """-> (n, k) in ``out_dtype``, values rounded to ``dtype``."""
    out = torch.empty((n, k), dtype=out_dtype, device=packed.device)
    nf4_dequant_into(
        out, packed, absmax, code, nested_absmax, nested_code, offset, blocksize,
        nested_blocksize, dtype,
    )  # fmt: skip
    return out


def nf4_dequant_into(
    out: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, blocksize: int, nested_blocksize: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Decode into a caller's buffer, contiguous."""
    if out.numel() == 0:
        return
    nested = nested_absmax is not None
    nf4_dequant_kernel[(triton.cdiv(out.numel(), 2 * _BLOCK),)](
        packed, absmax, code, nested_absmax if nested else code, nested_code if nested else code,
        offset if nested else code, out, out.numel(), QBLOCK=blocksize,
        NESTED_BLOCK=nested_blocksize if nested else 0, ROUND=TL_DTYPE[dtype], BLOCK=_BLOCK,
        enable_fp_fusion=False,
    )  # fmt: skip


def why_not_nf4_dequant(packed: Tensor, *rest: object) -> str | None:
    if any(kind not in TL_DTYPE for kind in rest[-2:]):
        return f"a 4-bit weight of dtype {rest[-2]} as {rest[-1]}"
    return why_not_here(packed.device)
