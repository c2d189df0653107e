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
from fastadapt.ops import native, scratch
from fastadapt.ops.bits import Bits, Dense, flatten, unflatten
from fastadapt.ops.dispatch import Op
from fastadapt.ops.nf4 import nf4_dequant_into, nf4_dequant_reference

_CACHED = 1 << 17
"""Elements of W that are widened and read twice while they are in a core's cache."""


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
    """From the factors, with U = W A^T and G = A A^T:
    norm_i^2 = ||W_i||^2 + 2 s <B_i, U_i> + s^2 B_i G B_i^T. W is read once, a cached part at a
    time, and B A is never made. ||W_i||^2 is not kept from call to call: it rides along with U, and
    nothing tells of a change made through ``weight.data``.

    A sum that cancels loses digits: its relative error is eps kappa^2 / 2, where that of the plain
    sum is eps kappa, kappa = (||W_i|| + ||s (B A)_i||) / norm_i. Rows with kappa^2 > 8 may be below
    a quarter of their squares' sum; the rows that are take the plain sum."""
    bits = _bits(flat)
    w = (
        bits.w
        if isinstance(bits, Dense)
        else nf4_dequant_into(bits, scratch.take(bits.shape, bits.dtype))
    )
    a, b = a.float() * scale, b.float()
    u, square = b.new_empty(b.shape), b.new_empty(b.shape[0])
    step = max(1, _CACHED // max(w.shape[1], 1))
    for i in range(0, w.shape[0], step):
        part = w[i : i + step].float()
        torch.mm(part, a.t(), out=u[i : i + step])
        torch.linalg.vector_norm(part, dim=1, out=square[i : i + step])
    square.square_()
    delta = torch.linalg.vecdot(b @ (a @ a.t()), b)
    total = square + 2 * torch.linalg.vecdot(b, u) + delta
    cancels = ~(total >= (square + delta) / 4)
    norm: Tensor = total.clamp_(min=0).sqrt_()
    if cancels.any():
        rows = cancels.nonzero().squeeze(1)
        norm[rows] = torch.linalg.vector_norm(w[rows].float() + b[rows] @ a, dim=1)
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
