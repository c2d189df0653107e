# SPDX-License-Identifier: Apache-2.0
"""The steps of ``low_rank`` that implementations differ in, and the three sets of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.ops import native, scratch
from fastadapt.ops.bits import Bits, Dense, Nf4, whole_blocks
from fastadapt.ops.dropout import dropout_native, dropout_reference
from fastadapt.ops.nf4 import nf4_dequant_into, nf4_dequant_reference
from fastadapt.ops.precision import HALVES, product_dtype


class Steps(NamedTuple):
    """The steps that implementations differ in. p is 0 where seed is None.

    product:    (y, x, bits, compute, transposed) -> y + x W^T (or x W), possibly in y
    down:       (x, a, p, seed, dtype) -> u (m, r) in dtype
    up_grad:    (g, u, b, scale) -> du (m, r), db (n, r)
    down_grad:  (x, du, p, seed, dtype of a) -> da (r, k)
    input_grad: (du, a, p, seed) -> dx (m, k), the low-rank part's
    """

    product: Callable[[Tensor, Tensor, Bits, torch.dtype, bool], Tensor]
    down: Callable[[Tensor, Tensor, float, Tensor | None, torch.dtype], Tensor]
    up_grad: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    down_grad: Callable[[Tensor, Tensor, float, Tensor | None, torch.dtype], Tensor]
    input_grad: Callable[[Tensor, Tensor, float, Tensor | None], Tensor]


Decode = Callable[[Bits, torch.dtype, torch.dtype], Tensor]


def _decoded_product(decode: Decode) -> Callable[..., Tensor]:
    """y + x W^T around a decoder: (bits, compute, math) -> W (n, k), rounded to ``compute`` and
    held in ``math``.

    With beta = 1 a CPU's fp32 product starts its sums from y, so that each of their roundings is
    one of y's size: 2.8 times plain PyTorch's error where y is 100 times the product of 1536
    terms, 11 times for one token. cuBLAS and the 16-bit products add y to the finished sum."""

    def product(y: Tensor, x: Tensor, bits: Bits, compute: torch.dtype, transposed: bool) -> Tensor:
        math = product_dtype(compute, x.device)
        w = decode(bits, compute, math)
        w = w.t() if transposed else w
        if y.dtype != math:
            return y + (x.to(math) @ w).to(y.dtype)
        if y.device.type == "cpu" and math not in HALVES:
            return y.add_(x.to(math) @ w)
        return y.addmm_(x.to(math), w)

    return product


def of_the_layer(
    x: Tensor, bits: Bits | None, bias: Tensor | None, compute: torch.dtype
) -> Tensor | None:
    """x W^T + bias by the call that a dense layer itself makes, in full precision on a CPU: other
    products round their sums in another order, and an adapter of zeros is to change no bit."""
    if not isinstance(bits, Dense) or x.device.type != "cpu" or x.dtype in HALVES:
        return None
    return F.linear(x, bits.w, bias) if x.dtype == bits.w.dtype == compute else None


def _plain(decode: Decode, drop: Callable[..., Tensor]) -> Steps:
    """The steps in PyTorch, around a decoder and a dropout."""

    def dropped(x: Tensor, p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
        return x.to(dtype) if seed is None else drop(x, seed, p, dtype)

    def down(x: Tensor, a: Tensor, p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
        return dropped(x, p, seed, dtype) @ a.to(dtype).t()

    def up_grad(g: Tensor, u: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return g @ (b * scale).to(g.dtype), ((g.t() @ u) * scale).to(b.dtype)

    def down_grad(
        x: Tensor, du: Tensor, p: float, seed: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return (du.t() @ dropped(x, p, seed, du.dtype)).to(dtype)

    def input_grad(du: Tensor, a: Tensor, p: float, seed: Tensor | None) -> Tensor:
        return dropped(du @ a.to(du.dtype), p, seed, du.dtype)

    return Steps(_decoded_product(decode), down, up_grad, down_grad, input_grad)


def _decode(bits: Bits, compute: torch.dtype, math: torch.dtype) -> Tensor:
    if isinstance(bits, Dense):
        return bits.w.to(compute).to(math)
    return nf4_dequant_reference(*bits, compute).to(math)


def _decode_native(bits: Bits, compute: torch.dtype, math: torch.dtype) -> Tensor:
    """Into this thread's scratch: a fresh 64 MB tensor costs more in page faults than in decoding
    (18 ms against 2 for 4096 x 4096)."""
    if isinstance(bits, Dense):
        if bits.w.dtype == math:
            return bits.w
        return scratch.take(bits.shape, math).copy_(bits.w.to(compute))
    if compute != torch.float64 and bits.dtype in (compute, torch.float32):
        return nf4_dequant_into(bits._replace(dtype=compute), scratch.take(bits.shape, math))
    return _decode(bits, compute, math)


FEW_TOKENS = 32
"""Up to here decoding row by row into cache wins over decoding to memory and calling a GEMM, in
fp32. 4096 x 4096, 2 cores with AVX2, ms a product: 3.5 against 32 at 1 token, 42 against 79 at 16,
112 against 117 at 32. With AVX-512 it wins at any number, the GEMM without a decode even: in fp32
6.6 against 14 at 32, 83 against 104 at 512; in bf16 (AVX-512 BF16) 3.5 against 4.1 and 39.5 against
42."""


def _native_product(
    y: Tensor, x: Tensor, bits: Bits, compute: torch.dtype, transposed: bool
) -> Tensor:
    if not isinstance(bits, Nf4) or bits.dtype not in (compute, torch.float32):
        return _native_decoded(y, x, bits, compute, transposed)
    whole = compute != torch.float64 and bits.blocksize % 32 == 0 and bits.k % bits.blocksize == 0
    asked, isa = bits._replace(dtype=compute), native.isa()
    wide = whole and whole_blocks(bits.blocksize, bits.nested_blocksize, bits.k)
    if wide and isa >= native.AVX512_BF16 and compute == y.dtype == torch.bfloat16:
        total = y.contiguous()
        native.nf4_product_(total, x.to(compute).contiguous(), *asked, transposed)
        return total
    any_number = wide and isa >= native.AVX512 and product_dtype(compute, x.device) == torch.float32
    if whole and (0 < x.shape[0] <= FEW_TOKENS or any_number):
        total = y.new_zeros(y.shape, dtype=torch.float32)
        native.nf4_product_(total, x.float().contiguous(), *asked, transposed)
        return total.add_(y).to(y.dtype)
    return _native_decoded(y, x, bits, compute, transposed)


@cache
def triton_steps() -> Steps:
    kernels = import_module("fastadapt.kernels.low_rank")
    nf4 = import_module("fastadapt.kernels.nf4")

    def decode(bits: Bits, compute: torch.dtype, math: torch.dtype) -> Tensor:
        if isinstance(bits, Dense):
            return bits.w.to(compute).to(math)
        if bits.dtype in (compute, torch.float32):
            decoded: Tensor = nf4.nf4_dequant(*bits._replace(dtype=compute), math)
            return decoded
        return _decode(bits, compute, math)

    gemm = import_module("fastadapt.kernels.nf4_gemm")
    policy = import_module("fastadapt.kernels.policy")
    decoded_product = _decoded_product(decode)

    def product(y: Tensor, x: Tensor, bits: Bits, compute: torch.dtype, transposed: bool) -> Tensor:
        if isinstance(bits, Nf4) and policy.fused(
            x.shape[0], bits.k, bits.blocksize, bits.dtype, compute, x.device
        ):
            added: Tensor = gemm.add_product(y, x.to(compute), *bits, transposed=transposed)
            return added
        return decoded_product(y, x, bits, compute, transposed)

    def down(x: Tensor, a: Tensor, p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
        u: Tensor = kernels.down(x.to(dtype), a, p, seed, dtype)
        return u

    def down_grad(
        x: Tensor, du: Tensor, p: float, seed: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        da: Tensor = kernels.down_grad(x.to(du.dtype), du, p, seed, dtype)
        return da

    return Steps(product, down, kernels.up_grad, down_grad, kernels.input_grad)


_native_decoded = _decoded_product(_decode_native)
REFERENCE = _plain(_decode, dropout_reference)
NATIVE = _plain(_decode_native, dropout_native)._replace(product=_native_product)
