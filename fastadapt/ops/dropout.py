# SPDX-License-Identifier: Apache-2.0
"""Dropout from a seed:  y = x * keep(seed) / (1 - p), nothing stored for backward but the seed.

The mask is philox4x32-10 (Salmon et al., SC 2011), counter = flat index // 8, key = the seed; each
call gives eight 16-bit lanes, one an element, and an element is kept when its lane is at least
``round(65536 p)``. So p has a resolution of 1/65536, and the scale is that of the rounded p.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.errors import KernelError
from fastadapt.ops import native
from fastadapt.ops.dispatch import Op

_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, int64 (1,), from torch's generator of ``device``.

    A tensor, so that no GPU waits and a CUDA graph draws a new mask each replay; gradient
    checkpointing restores the generator and so gets the same mask."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """x: any shape and float dtype -> same shape and dtype. ``p`` as ``check_p`` wants it."""
    check_p(p)
    if p == 0:
        return x
    seed = draw_seed(x.device) if seed is None else seed
    out: Tensor = DropoutFunction.apply(x, seed, p)  # type: ignore[no-untyped-call]
    return out


class DropoutFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        y: Tensor = dropout_fwd(x, seed, p, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        return dropout_fwd(g, seed, ctx.p, g.dtype), None, None


def check_p(p: float) -> None:
    """Raise KernelError unless 0 <= p < 1 also when p is rounded to 1/65536."""
    if not (p >= 0 and threshold(p) < 65536):
        raise KernelError(f"dropout: expected 0 <= p < 1 - 2**-17, got {p}")


def threshold(p: float) -> int:
    """Lanes below this are dropped."""
    return round(p * 65536)


def keep_mask(seed: Tensor, numel: int, p: float) -> Tensor:
    """bool (numel,): True where the element is kept."""
    counter = torch.arange((numel + 7) // 8, dtype=torch.int64, device=seed.device)
    words = torch.stack(_philox(seed, counter), 1)
    lanes = torch.stack([words & 0xFFFF, words >> 16], 2).reshape(-1)
    return lanes[:numel] >= threshold(p)


def dropout_reference(x: Tensor, seed: Tensor, p: float, out_dtype: torch.dtype) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    keep = keep_mask(seed, x.numel(), p).view(x.shape)
    scale = 65536 / (65536 - threshold(p))
    return (wide * (keep * torch.full((), scale, dtype=wide.dtype, device=x.device))).to(out_dtype)


def dropout_native(x: Tensor, seed: Tensor, p: float, out_dtype: torch.dtype) -> Tensor:
    return native.dropout(x, seed, p, out_dtype)


def why_not_dropout_native(x: Tensor, *_: object) -> str | None:
    return native.why_not() if x.device.type == "cpu" else "x is not on a CPU"


def _philox(seed: Tensor, counter: Tensor, rounds: int = 10) -> tuple[Tensor, ...]:
    """Four 32-bit words, as int64, for each counter."""
    c0, c1 = counter & _WORD, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        # int64 products wrap, and their low 64 bits are those of the unsigned product
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p2 >> 32) & _WORD) ^ c1 ^ k0,
            p2 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


dropout_fwd = Op(
    "dropout",
    "(Tensor x, Tensor seed, float p, ScalarType out_dtype) -> Tensor",
    dropout_reference,
    triton="fastadapt.kernels.dropout:dropout",
    native="fastadapt.ops.dropout:dropout_native",
)
