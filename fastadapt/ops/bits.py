# SPDX-License-Identifier: Apache-2.0
"""How a frozen weight is stored, as the plain tensors that an op can eat.

A format (``fastadapt.weights``) hands one of these to an op; the op never sees the layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Dense(NamedTuple):
    """w: (n, k), any strides, any float dtype."""

    w: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.w.shape[0]), int(self.w.shape[1])

    @property
    def device(self) -> torch.device:
        return self.w.device

    @property
    def dtype(self) -> torch.dtype:
        return self.w.dtype


class Nf4(NamedTuple):
    """A 4-bit codebook weight in bitsandbytes' layout (NF4 and FP4 differ in ``code`` alone).

    packed:  uint8, n*k/2 bytes, the even element in the high nibble
    absmax:  float32 (n*k/blocksize,), or uint8 indices into ``nested_code``
    code:    float32 (16,)
    nested_absmax: float32 (ceil(blocks / nested_blocksize),); nested_code: float32 (256,)
    offset:  float32 (), added to every decoded absmax
    dtype:   what decoded values are rounded to
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    blocksize: int
    nested_blocksize: int
    n: int
    k: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    @property
    def device(self) -> torch.device:
        return self.packed.device


Bits = Dense | Nf4


def why_not_whole(bits: Nf4) -> str | None:
    """What is missing of a 4-bit weight, as "expected .., got ..": a kernel would read past the end
    of a tensor that is too short. None for a whole one."""
    numel = bits.n * bits.k
    blocks = -(-numel // bits.blocksize) if bits.blocksize > 0 else -1
    if blocks < 0:
        return f"expected a blocksize above 0, got {bits.blocksize}"
    if bits.packed.dtype != torch.uint8 or bits.packed.numel() * 2 < numel:
        return (
            f"expected packed uint8 of {-(-numel // 2)} bytes for W ({bits.n}, {bits.k}), got "
            f"{bits.packed.dtype} of {bits.packed.numel()}"
        )
    if bits.code.numel() != 16:
        return f"expected a codebook of 16 values, got {bits.code.numel()}"
    if bits.absmax.numel() < blocks:
        return f"expected absmax of {blocks} blocks, got {bits.absmax.numel()}"
    if bits.nested_absmax is None:
        return None
    if bits.nested_code is None or bits.offset is None or bits.nested_blocksize <= 0:
        return "expected nested_code, offset and nested_blocksize with nested_absmax, got not all"
    coarse = -(-blocks // bits.nested_blocksize)
    if bits.nested_code.numel() != 256 or bits.nested_absmax.numel() < coarse:
        return (
            f"expected nested_code of 256 values and nested_absmax of {coarse}, got "
            f"{bits.nested_code.numel()} and {bits.nested_absmax.numel()}"
        )
    return None


def whole_blocks(blocksize: int, nested_blocksize: int, k: int) -> bool:
    """Whether every 64 columns of a row have one scale, and scales are found by shifts: what the
    AVX-512 kernels ask. ``nested_blocksize`` is 0 where there are no nested ones."""
    powers = not (blocksize & (blocksize - 1) or nested_blocksize & (nested_blocksize - 1))
    return powers and blocksize >= 64 and k % blocksize == 0


FLAT_TENSORS = 6
"""How many of the flat fields are tensors (or None)."""


def flatten(bits: Bits | None) -> tuple[Any, ...]:
    """The flat form that op schemas take: six tensors (or None), four ints, a dtype."""
    if bits is None:
        return (None,) * FLAT_TENSORS + (0, 0, 0, 0, torch.float32)
    if isinstance(bits, Dense):
        return (bits.w, None, None, None, None, None, 0, 0, *bits.w.shape, bits.w.dtype)
    return tuple(bits)


def unflatten(flat: tuple[Any, ...]) -> Bits | None:
    """The bits again."""
    if flat[0] is None:
        return None
    return Dense(flat[0]) if flat[1] is None else Nf4(*flat)
