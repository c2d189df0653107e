# SPDX-License-Identifier: Apache-2.0
"""Decode a 4-bit weight, nested absmax included, in one kernel; bit for bit bitsandbytes' values.

A 16-entry table is read by ``tl.gather``, and a scale once for its block (docs/kernels.md: 7.4 to
7.8 instructions an element on sm_90, a tree of selects takes 17). The scale of an absmax is rounded
before the offset is added, so multiply-add fusion is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import why_not_here

TILE = 8192
"""Elements a program decodes."""
LAUNCH = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


@triton.jit
def scale_of(
    block, inside, absmax, nested_absmax, nested_code, offset,
    NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """The fp32 scale of the quantisation block ``block``; anything where it is not ``inside``."""
    if NESTED_BLOCK == 0:
        return tl.load(absmax + block, mask=inside)
    index = tl.load(absmax + block, mask=inside).to(tl.int32)
    # fewer than 2^32 blocks are 137 GB of weights; a signed division takes three instructions more
    coarse = tl.load(nested_absmax + block.to(tl.uint32) // NESTED_BLOCK, mask=inside)
    return tl.load(nested_code + index) * coarse + tl.load(offset)


@triton.jit
def _bytes(packed):
    """uint8 as it is, int32 as its four bytes; the bits above the eighth are anything."""
    if packed.dtype == tl.uint8:
        byte = packed.to(tl.int32)
    else:
        half = tl.interleave(packed, packed >> 16)
        byte = tl.interleave(half, half >> 8)
    return byte


@triton.jit
def pair_table(code, ROUND: tl.constexpr):
    """256 x int32: both values of a byte, rounded to 16 bits, the even element in the low half."""
    byte = tl.arange(0, 256)
    even = tl.load(code + (byte >> 4)).to(ROUND).to(tl.int16, bitcast=True).to(tl.int32)
    odd = tl.load(code + (byte & 15)).to(ROUND).to(tl.int16, bitcast=True).to(tl.int32)
    return (even & 0xFFFF) | (odd << 16)


@triton.jit
def decode_pairs(packed, table, ROUND: tl.constexpr):
    """As ``decode``, by one look-up a byte in ``pair_table``: the codebook rounded to ROUND."""
    byte = _bytes(packed) & 255
    pair = tl.reshape(tl.gather(table, tl.reshape(byte, (byte.numel,)), 0), byte.shape)
    if tl.bfloat16 == ROUND:
        even = (pair << 16).to(tl.float32, bitcast=True)
        odd = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        even = (pair & 0xFFFF).to(tl.int16).to(ROUND, bitcast=True).to(tl.float32)
        odd = (pair >> 16).to(tl.int16).to(ROUND, bitcast=True).to(tl.float32)
    return tl.interleave(even, odd)


@triton.jit
def decode(packed, table):
    """packed: (R, B), uint8 or int32 of four bytes -> fp32 (R, 2 B or 8 B), without the scale.

    The even element is in the high nibble. One gather for all: each writes the table to shared
    memory and waits for it."""
    byte = _bytes(packed)
    nibble = tl.interleave(byte >> 4, byte) & 15
    return tl.reshape(tl.gather(table, tl.reshape(nibble, (nibble.numel,)), 0), nibble.shape)


@triton.jit
def decode_tile(
    words, absmax, code, nested_absmax, nested_code, offset, row, within, column, k,
    QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    ROUND: tl.constexpr = tl.float32, PAIRS: tl.constexpr = False,
):  # fmt: skip
    """W[row + within, column ... column + COLUMNS] in fp32. words: int32; within: int32,
    below 2^16; all rows are in W.

    The columns of a row lie in one quantisation block, so that a row has one scale, and COLUMNS
    divides k and column. What changes from tile to tile is added to the pointer, one for all
    threads: what a thread adds to that stays.
    PAIRS: the codebook rounded to the 16-bit type ROUND, a byte a look-up; else the exact one."""
    row = tl.cast(row, tl.int64)
    first = row * (k // 8) + column // 8
    place = within[:, None] * (k // 8) + tl.arange(0, COLUMNS // 8)[None, :]
    word = tl.load(words + first + place)
    if QBLOCK == COLUMNS:
        start = row * (k // QBLOCK) + column // QBLOCK
        block = start.to(tl.uint32) + (within * (k // QBLOCK)).to(tl.uint32)
    else:
        block = ((row + within) * k + column) // QBLOCK
    scale = scale_of(block, None, absmax, nested_absmax, nested_code, offset, NESTED_BLOCK)
    if PAIRS:
        value = decode_pairs(word, pair_table(code, ROUND), ROUND)
    else:
        value = decode(word, tl.load(code + tl.arange(0, 16)))
    return value * scale[:, None]


@triton.jit
def _decode_blocks(
    part, packed, absmax, code, nested_absmax, nested_code, offset, out, numel, numel_bytes,
    QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS quantisation blocks, each a row of the tile, from the ``part``-th BLOCKS on.

    numel_bytes is an argument, because a mask is vectorised only where its bound is known to be
    divisible by 16, and (numel + 1) // 2 is not."""
    HALF: tl.constexpr = QBLOCK // 2
    first = part.to(tl.int64) * BLOCKS
    rows = tl.arange(0, BLOCKS)
    left = tl.minimum(numel - first * QBLOCK, BLOCKS * QBLOCK).to(tl.int32)
    left_bytes = tl.minimum(numel_bytes - first * HALF, BLOCKS * HALF).to(tl.int32)
    table = tl.load(code + tl.arange(0, 16))
    i = rows[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(packed + first * HALF + i, mask=i < left_bytes, other=0)
    scale = scale_of(first + rows, rows * QBLOCK < left, absmax, nested_absmax, nested_code,
                     offset, NESTED_BLOCK)  # fmt: skip
    value = (decode(byte, table) * scale[:, None]).to(ROUND).to(out.dtype.element_ty)
    j = rows[:, None] * QBLOCK + tl.arange(0, QBLOCK)[None, :]
    tl.store(out + first * QBLOCK + j, value, mask=j < left)


@triton.jit
def nf4_dequant_kernel(
    packed, absmax, code, nested_absmax, nested_code, offset, out, numel, numel_bytes,
    QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """grid (parts of BLOCKS blocks,)."""
    _decode_blocks(tl.program_id(0), packed, absmax, code, nested_absmax, nested_code, offset, out,
                   numel, numel_bytes, QBLOCK, NESTED_BLOCK, ROUND, BLOCKS)  # fmt: skip


@triton.jit
def nf4_dequant_group_kernel(
    packed, absmax, code, nested_absmax, nested_code, offset, out, numel, numel_bytes,
    packed_1, absmax_1, code_1, nested_absmax_1, nested_code_1, offset_1, out_1, numel_1, bytes_1,
    packed_2, absmax_2, code_2, nested_absmax_2, nested_code_2, offset_2, out_2, numel_2, bytes_2,
    first_1, first_2,
    QBLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROUND: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Three weights, the second from program ``first_1`` on, the third from ``first_2`` on.

    A program chooses its pointers and then decodes: the code is there once."""
    part = tl.program_id(0)
    if part >= first_2:
        part -= first_2
        packed, absmax, code = packed_2, absmax_2, code_2
        nested_absmax, nested_code, offset = nested_absmax_2, nested_code_2, offset_2
        out, numel, numel_bytes = out_2, numel_2, bytes_2
    elif part >= first_1:
        part -= first_1
        packed, absmax, code = packed_1, absmax_1, code_1
        nested_absmax, nested_code, offset = nested_absmax_1, nested_code_1, offset_1
        out, numel, numel_bytes = out_1, numel_1, bytes_1
    _decode_blocks(part, packed, absmax, code, nested_absmax, nested_code, offset, out, numel,
                   numel_bytes, QBLOCK, NESTED_BLOCK, ROUND, BLOCKS)  # fmt: skip


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
    stored = (packed, absmax, code, nested_absmax, nested_code, offset)
    nf4_dequant_kernel[(_parts(out, blocksize),)](
        *_weight(out, stored), **_fixed(blocksize, nested_blocksize, nested_absmax, dtype),
    )  # fmt: skip


def nf4_dequant_group_into(
    outs: Sequence[Tensor], weights: Sequence[Sequence[Any]], dtype: torch.dtype
) -> None:
    """Several weights, each into a contiguous buffer of its own, three a launch. A weight is the
    arguments of ``nf4_dequant_into`` from ``packed`` to ``nested_blocksize``."""
    held: dict[tuple[Any, ...], list[tuple[Tensor, Sequence[Any]]]] = {}
    for out, weight in zip(outs, weights, strict=True):
        if out.numel():
            blocksize, nested_blocksize = weight[6:8]
            key = (blocksize, nested_blocksize if weight[3] is not None else 0)
            held.setdefault(key, []).append((out, weight))
    for (blocksize, nested_blocksize), same in held.items():
        for i in range(0, len(same), 3):
            some = same[i : i + 3]
            if len(some) == 1:
                out, weight = some[0]
                nf4_dequant_into(out, *weight, dtype)
                continue
            ends = list(accumulate(_parts(out, blocksize) for out, _ in some))
            # where there are two, no program comes to the third
            three = [*some, some[-1]][:3]
            nf4_dequant_group_kernel[(ends[-1],)](
                *(v for out, weight in three for v in _weight(out, weight[:6])), *ends[:2],
                **_fixed(blocksize, nested_blocksize, some[0][1][3], dtype),
            )  # fmt: skip


def _parts(out: Tensor, blocksize: int) -> int:
    return -(-out.numel() // (max(1, TILE // blocksize) * blocksize))


def _weight(out: Tensor, stored: Sequence[Any]) -> tuple[Any, ...]:
    """What a kernel is told of one weight; any tensor stands for one that is not there."""
    packed, absmax, code, *nested = stored
    if nested[0] is None:
        nested = [code] * 3
    return packed, absmax, code, *nested, out, out.numel(), packed.numel()


def _fixed(
    blocksize: int, nested_blocksize: int, nested: Tensor | None, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "QBLOCK": blocksize, "NESTED_BLOCK": 0 if nested is None else nested_blocksize,
        "ROUND": TL_DTYPE[dtype], "BLOCKS": max(1, TILE // blocksize), **LAUNCH,
    }  # fmt: skip


def words(packed: Tensor) -> Tensor:
    """packed as int32 where that is possible, else as it is; flat, the same memory."""
    flat = packed.reshape(-1)
    whole = flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0
    return flat.view(torch.int32) if whole else flat


def why_not_nf4_dequant(packed: Tensor, *rest: object) -> str | None:
    if any(kind not in TL_DTYPE for kind in rest[-2:]):
        return f"a 4-bit weight of dtype {rest[-2]} as {rest[-1]}"
    return why_not_here(packed.device)
