# SPDX-License-Identifier: Apache-2.0
"""The compiled extension ``fastadapt._C``: CPU kernels, loaded once, at first use.

It is a plain shared library next to the package's modules, written against libtorch's stable ABI;
loading it defines ``torch.ops.fastadapt_native``. It is optional: the PyTorch reference serves
where it is not built.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HOW_TO_BUILD = (
    "install again where a C++ compiler and torch are: pip install --no-build-isolation ."
)


def available() -> bool:
    """Whether the extension is built and loads; the answer does not change within a process."""
    return why_not() is None


@cache
def why_not() -> str | None:
    """Why the extension cannot be used and what to do about it, None when it can."""
    package = Path(__file__).resolve().parents[1]
    found = sorted(package.glob("_C*.so"))
    if not found:
        return f"fastadapt._C is not built; {_HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"fastadapt._C failed to load ({error}); {_HOW_TO_BUILD}"
    return None


AVX512, AVX512_BF16 = 2, 3
"""Of ``isa``; below them are plain C++ (0) and AVX2 with FMA (1)."""


@cache
def isa() -> int:
    """The kernels that this CPU can run, and FASTADAPT_ISA allows; 0 without the extension."""
    return int(torch.ops.fastadapt_native.isa()) if available() else 0


def nf4_dequant_(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> None:
    """out[i] = code[nibble(i)] * absmax[i // blocksize], rounded to ``dtype``, then stored.

    out:    contiguous, float32, bfloat16 or float16, any shape; written in place
    packed: uint8, ceil(out.numel() / 2) bytes, the even element in the high nibble
    absmax: float32 (blocks,); or uint8, then
            ``nested_code[absmax] * nested_absmax[block // nested_blocksize] + offset``
    The bits are those of bitsandbytes' dequantize_4bit. Raises KernelError without the extension,
    RuntimeError for tensors that do not fit.
    """
    _require()
    torch.ops.fastadapt_native.nf4_dequant_(
        out, packed, absmax, code, nested_absmax, nested_code, offset,
        blocksize, nested_blocksize, dtype,
    )  # fmt: skip


def nf4_product_(
    y: Tensor,
    x: Tensor,
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
    transposed: bool,
) -> None:
    """y += x W^T (``transposed``) or y += x W, W (n, k) decoded row by row into cache.

    x: (m, k) or (m, n)  y: (m, n) or (m, k), both float32 and contiguous; k % blocksize == 0.
    Or both bfloat16, with blocks of a power of two from 64 on, on a CPU with AVX-512 BF16.
    fp32 accumulation; the result does not depend on the number of threads. Raises KernelError
    without the extension, RuntimeError for tensors that do not fit.
    """
    _require()
    torch.ops.fastadapt_native.nf4_product_(
        y, x, packed, absmax, code, nested_absmax, nested_code, offset,
        blocksize, nested_blocksize, n, k, dtype, transposed,
    )  # fmt: skip


def dropout(x: Tensor, seed: Tensor, p: float, out_dtype: torch.dtype) -> Tensor:
    """y = x * (keep ? 1 / (1 - p) : 0), rounded once to ``out_dtype``; a new contiguous tensor.

    x: any shape and strides, float32, bfloat16, float16 or float64   seed: int64 (1,)
    The mask is that of ``fastadapt.ops.dropout``. Raises KernelError without the extension,
    RuntimeError for tensors that do not fit and for p outside [0, 1).
    """
    _require()
    y: Tensor = torch.ops.fastadapt_native.dropout(x, seed, p, out_dtype)
    return y


def low_rank_fwd(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, *bits: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (.., n), u (m, r) of ``fastadapt.ops.low_rank`` for x (.., k), a float32 or bfloat16 x.

    bits: ``fastadapt.ops.bits.flatten``; or int8 (n, k) with its row's absmax, float32 (n,)
    The low-rank part is added in the base product's own sums, and each result is rounded once; the
    mask's scale is applied to u in fp32. Results do not depend on the number of threads. Needs
    AVX-512 (BF16 for a bfloat16 x). Raises RuntimeError for tensors that do not fit."""
    result: tuple[Tensor, Tensor] = torch.ops.fastadapt_native.low_rank_fwd.default(
        x, bias, a, b, scale, p, seed, *bits[:8], bits[10]
    )
    return result


def low_rank_bwd(
    g: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, scale: float, p: float,
    seed: Tensor | None, need_x: bool, need_a: bool, need_b: bool, *bits: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, da, db of the same, an empty tensor where one is not needed."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.fastadapt_native.low_rank_bwd.default(
        g, x, u, a, b, scale, p, seed, need_x, need_a, need_b, *bits[:8], bits[10]
    )
    return result


def cross_entropy_fwd(x: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """loss (rows,) and lse (rows, 2), float32, of ``fastadapt.ops.cross_entropy``.

    x: (rows, columns), float32 or bfloat16   labels: int64, contiguous
    Needs AVX-512. Raises RuntimeError for what does not fit."""
    result: tuple[Tensor, Tensor] = torch.ops.fastadapt_native.cross_entropy_fwd(x, labels, ignore)
    return result


def cross_entropy_bwd(x: Tensor, labels: Tensor, lse: Tensor, g: Tensor, ignore: int) -> Tensor:
    """dx of the same; g: float32 (rows,)."""
    dx: Tensor = torch.ops.fastadapt_native.cross_entropy_bwd(x, labels, lse, g, ignore)
    return dx


def _require() -> None:
    reason = why_not()
    if reason is not None:
        from fastadapt.errors import KernelError

        raise KernelError(reason)
