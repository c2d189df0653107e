# SPDX-License-Identifier: Apache-2.0
"""The norm of each row of W + s B A, for DoRA:  norm[i] = || W[i] + s (B A)[i] ||.

    W: (n, k)  a: (r, k)  b: (n, r)  ->  (n,) float32 (float64 for a float64 W)

Not differentiable: DoRA treats the norm as a constant (arXiv 2402.09353, section 4.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.errors import KernelError
from fastadapt.ops import native
from fastadapt.ops.bits import Bits, Dense, flatten, unflatten
from fastadapt.ops.dispatch import Op
from fastadapt.ops.nf4 import nf4_dequant_into, nf4_dequant_reference


def row_norm(bits: Bits, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """See the module's first lines; ``a`` and ``b`` are taken as constants."""
    norm: Tensor = _op(a.detach(), b.detach(), scale, *flatten(bits))
    return norm


def row_norm_reference(a: Tensor, b: Tensor, scale: float, *flat: Any) -> Tensor:
    bits = _bits(flat)
    wide = torch.float64 if bits.dtype == torch.float64 else torch.float32
    w = bits.w if isinstance(bits, Dense) else nf4_dequant_reference(*bits, bits.dtype)
    merged = w.to(wide) + scale * (b.to(wide) @ a.to(wide))
    norm: Tensor = torch.linalg.vector_norm(merged, dim=1)
    return norm


def row_norm_native(a: Tensor, b: Tensor, scale: float, *flat: Any) -> Tensor:
    """The delta is written once, and W is decoded or added into it: one temporary."""
    w = b.float() @ (a.float() * scale)
    bits = _bits(flat)
    if isinstance(bits, Dense):
        w += bits.w
    else:
        w += nf4_dequant_into(bits, torch.empty(bits.shape, dtype=bits.dtype))
    norm: Tensor = torch.linalg.vector_norm(w, dim=1)
    return norm


def why_not_row_norm_native(a: Tensor, b: Tensor, scale: float, *flat: Any) -> str | None:
    if flat[0].device.type != "cpu":
        return "the weight is not on a CPU"
    if flat[0].dtype == torch.float64:
        return "W is float64"
    return native.why_not()


def _bits(flat: tuple[Any, ...]) -> Bits:
    bits = unflatten(flat)
    if bits is None:
        raise KernelError("row_norm: expected a weight, got none")
    return bits


_op = Op(
    "row_norm",
    "(Tensor a, Tensor b, float scale, Tensor w, Tensor? absmax, Tensor? code, "
    "Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int blocksize, "
    "int nested_blocksize, SymInt n, SymInt k, ScalarType dtype) -> Tensor",
    row_norm_reference,
    triton="fastadapt.kernels.row_norm:row_norm",
    native="fastadapt.ops.row_norm:row_norm_native",
)
