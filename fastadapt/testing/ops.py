# SPDX-License-Identifier: Apache-2.0
"""Cases of the low-rank ops, in every dtype, weight format and layout; weights as bitsandbytes
stores and decodes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.ops.bits import Bits, Dense, Nf4
from fastadapt.ops.dropout import keep_mask, threshold


@dataclass(frozen=True, kw_only=True)
class LowRankCase:
    """x: (m, k)  W: (n, k)  a: (r, k)  b: (n, r)  bias: (n,).

    bits:    none, dense, nf4 (nested absmax), nf4-flat, fp4
    dtype:   of x, of the product and of the result; pair: of a and b
    layout:  of x: rows (m, k), batch (.., k) with two leading sizes, strided, transposed
    """

    m: int = 17
    k: int = 64
    n: int = 48
    r: int = 8
    bits: str = "dense"
    dtype: torch.dtype = torch.float32
    pair: torch.dtype | None = None
    compute: torch.dtype | None = None
    p: float = 0.0
    bias: bool = True
    layout: str = "rows"
    scale: float = 1.7

    def __str__(self) -> str:
        shown = [self.bits, _short(self.dtype)]
        shown += [f"{key}{getattr(self, key)}" for key in "mknr"
                  if getattr(self, key) != getattr(LowRankCase, key)]  # fmt: skip
        shown += [f"p{self.p}"] if self.p else []
        shown += [] if self.bias else ["nobias"]
        shown += [self.layout] if self.layout != "rows" else []
        shown += [f"pair_{_short(self.pair)}"] if self.pair else []
        shown += [f"compute_{_short(self.compute)}"] if self.compute else []
        return "-".join(shown)

    def make(self, seed: int = 0, device: str = "cpu") -> LowRankInputs:
        """Fresh tensors, the same for the same seed. Needs bitsandbytes for 4-bit weights."""
        g = torch.Generator().manual_seed(seed)
        m, k, n, r, dtype = self.m, self.k, self.n, self.r, self.dtype
        x = _laid_out(torch.randn(m, k, generator=g).to(device, dtype), self.layout)
        w = torch.randn(n, k, generator=g) / k**0.5
        kept = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
        bits: Bits | None = None
        if self.bits == "dense":
            bits = Dense(w.to(dtype))
        elif self.bits != "none":
            kind, _, flat = self.bits.partition("-")
            bits = quantised(w.to(kept), kind, nested=not flat)
        pair = self.pair or dtype
        return LowRankInputs(
            x=x,
            bits=None if bits is None else moved(bits, device),
            w=None if bits is None else decoded(bits).to(device, self.compute or dtype),
            a=(torch.randn(r, k, generator=g) / k**0.5).to(device, pair),
            b=(torch.randn(n, r, generator=g) / r**0.5).to(device, pair),
            bias=torch.randn(n, generator=g).to(device, dtype) if self.bias else None,
            g=torch.randn(*x.shape[:-1], n, generator=g).to(device, dtype),
        )


@dataclass(frozen=True, kw_only=True)
class LowRankInputs:
    """w: the weight in ``bits``, as bitsandbytes decodes it; g: the gradient that comes in."""

    x: Tensor
    bits: Bits | None
    w: Tensor | None
    a: Tensor
    b: Tensor
    bias: Tensor | None
    g: Tensor


def plain_low_rank(
    x: Tensor, w: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None, scale: float,
    drop: Tensor | None = None, compute: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """y = x W^T + bias + s (x * drop) A^T B^T as one writes it without this library.

    drop: the factors of ``drop_factors``; compute: the dtype of the base product (default x's)"""
    dropped = x if drop is None else x * drop.to(x.dtype)
    y = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype)) * scale
    if w is not None:
        y = y + F.linear(x.to(compute or x.dtype), w.to(compute or x.dtype)).to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def drop_factors(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """0 or 1 / (1 - p) for each element, float64, p as the op rounds it."""
    numel = torch.Size(shape).numel()
    return (keep_mask(seed, numel, p).double() * (65536 / (65536 - threshold(p)))).view(*shape)


def quantised(w: Tensor, kind: str = "nf4", *, nested: bool = True, blocksize: int = 64) -> Nf4:
    """w: (n, k) as bitsandbytes stores it; ``kind``: nf4 or fp4."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        w, blocksize=blocksize, compress_statistics=nested, quant_type=kind
    )
    inner = state.state2 if nested else None
    return Nf4(
        packed, state.absmax, state.code, inner.absmax if inner else None,
        inner.code if inner else None, state.offset if inner else None, blocksize,
        inner.blocksize if inner else 0, w.shape[0], w.shape[1], w.dtype,
    )  # fmt: skip


def moved(bits: Bits, device: str) -> Bits:
    """The same bits on another device."""
    values: Any = [v.to(device) if isinstance(v, Tensor) else v for v in bits]
    return type(bits)(*values)


def decoded(bits: Bits) -> Tensor:
    """The weight (n, k) in ``bits.dtype``, by bitsandbytes where it is 4-bit."""
    if isinstance(bits, Dense):
        return bits.w
    import bitsandbytes.functional as bnb

    inner = None
    if bits.nested_absmax is not None:
        inner = bnb.QuantState(
            absmax=bits.nested_absmax, code=bits.nested_code, blocksize=bits.nested_blocksize,
            dtype=torch.float32,
        )  # fmt: skip
    # as one row: bitsandbytes' AVX-512 decoder misreads rows that are shorter than a block
    state = bnb.QuantState(
        absmax=bits.absmax, shape=torch.Size((1, bits.n * bits.k)), code=bits.code,
        dtype=bits.dtype, blocksize=bits.blocksize, quant_type="nf4" if bits.code[0] < 0 else "fp4",
        offset=bits.offset, state2=inner,
    )  # fmt: skip
    w: Tensor = bnb.dequantize_4bit(bits.packed.view(-1, 1), state)
    return w.view(bits.shape)


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _laid_out(x: Tensor, layout: str) -> Tensor:
    forms: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: x,
        "batch": lambda: x.view(2, x.shape[0] // 2, x.shape[1]),
        "strided": lambda: torch.stack([x, torch.full_like(x, torch.nan)], 2)[:, :, 0],
        "transposed": lambda: x.t().contiguous().t(),
    }
    return forms[layout]()
