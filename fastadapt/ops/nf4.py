# SPDX-License-Identifier: Apache-2.0
"""Decode a 4-bit codebook weight:  w[i] = code[nibble(i)] * absmax[i // blocksize].

With nested absmax (double quantisation) absmax itself is
``nested_code[absmax8] * nested_absmax[block // nested_blocksize] + offset``.
Source: QLoRA (arXiv 2305.14314); the layout is bitsandbytes', bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.errors import KernelError
from fastadapt.ops import native
from fastadapt.ops.bits import Nf4, why_not_whole
from fastadapt.ops.dispatch import Op


def nf4_dequant(bits: Nf4, out_dtype: torch.dtype | None = None) -> Tensor:
    """bits of (n, k) weights -> (n, k) in ``out_dtype``; values are rounded to ``bits.dtype``.

    An ``out_dtype`` wider than ``bits.dtype`` holds the rounded values exactly. Raises KernelError
    for tensors that are too short for the weight."""
    reason = why_not_whole(bits)
    if reason is not None:
        raise KernelError(f"nf4_dequant: {reason}")
    result: Tensor = _op(*bits, out_dtype or bits.dtype)
    return result


def nf4_dequant_reference(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    code = code.float()
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)
    values = F.embedding(packed.reshape(-1).int(), pairs).reshape(-1)
    if nested_absmax is not None and nested_code is not None:
        fine = F.embedding(absmax.int(), nested_code.float().unsqueeze(1)).squeeze(1)
        absmax = _per_block(fine, nested_absmax.float(), nested_blocksize)
        if offset is not None:
            absmax = absmax + offset.float()
    values = _per_block(values, absmax.float(), blocksize)
    # an odd number of elements leaves the last nibble over
    return values[: n * k].to(dtype).to(out_dtype).view(n, k)


def nf4_dequant_native(*args: Any) -> Tensor:
    *flat, out_dtype = args
    bits = Nf4(*flat)
    return nf4_dequant_into(bits, torch.empty(bits.shape, dtype=out_dtype, device="cpu"))


def why_not_nf4_dequant_native(packed: Tensor, *rest: object) -> str | None:
    if packed.device.type != "cpu":
        return "the weight is not on a CPU"
    if torch.float64 in rest[-2:]:
        return "float64 values"
    return native.why_not()


def nf4_dequant_into(bits: Nf4, out: Tensor) -> Tensor:
    """Decode into ``out`` (n, k), contiguous, on a CPU, by the native extension."""
    native.nf4_dequant_(out, *bits[:8], bits.dtype)
    return out


def _per_block(values: Tensor, scale: Tensor, blocksize: int) -> Tensor:
    """values (e,) times the scale (ceil(e / blocksize),) of the block that each stands in."""
    if values.shape[0] == scale.shape[0] * blocksize:
        return (values.view(-1, blocksize) * scale.unsqueeze(1)).view(-1)
    return values * scale.repeat_interleave(blocksize)[: values.shape[0]]


_op = Op(
    "nf4_dequant",
    "(Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? offset, int blocksize, int nested_blocksize, SymInt n, SymInt k, ScalarType dtype, "
    "ScalarType out_dtype) -> Tensor",
    nf4_dequant_reference,
    triton="fastadapt.kernels.nf4:nf4_dequant",
    native="fastadapt.ops.nf4:nf4_dequant_native",
)
