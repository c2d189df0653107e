# SPDX-License-Identifier: Apache-2.0
"""What is compiled ahead of time, one row a kernel: the types of its arguments, and its variants.

Tile sizes, warps and stages come from the tables that the launchers read, so that what is compiled
here is what a GPU runs. ``bench/aot.py`` compiles the rows and holds them to the laws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from . import dropout, low_rank, low_rank_mixed, nf4, nf4_gemm, reflect, rotate, row_norm, scale
from .mixed_plan import ADAPTER, TILE
from .tiles import INPUT_GRAD, NORM_AGAIN, REFLECT, ROTATE, ROTATE_GRAD, TILES, gemm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DECODE_LIMIT, PAIR_LIMIT = 9.2, 7.5
"""Instructions an element: a look-up for each, and a look-up for two."""


class Variant(NamedTuple):
    """One specialisation of a kernel.

    fixed:    constexpr -> value, and the compiler's options
    types:    arguments whose type is not the row's
    dots:     it multiplies matrices
    elements: weights or inputs that one round of its loop (without one: a program) works on
    decodes:  these elements are 4-bit codes, and little else is done with them
    limit:    instructions an element that decoding may take on sm_90
    quick:    in the default test run
    """

    name: str
    fixed: dict[str, Any]
    types: Mapping[str, str] = MappingProxyType({})
    dots: bool = True
    elements: int = 0
    decodes: bool = False
    limit: float = DECODE_LIMIT
    quick: bool = False


class Row(NamedTuple):
    """signature: "type name, ..": D is the dtype; pointers, and integers without "?", are divisible
    by 16, as the sizes of models are; "1 name" is the constant. variants: dtype -> variants."""

    kernel: Any
    signature: str
    variants: Callable[[str], Iterator[Variant]]


_RANKS = (16, 32, 64, 128, 256)
_STATS = "*fp32 absmax, *fp32 code, *fp32 nested_absmax, *fp32 nested_code, *fp32 offset"
_FLAT, _NESTED = ("flat", 0), ("nested", 256)


def _dropout(dtype: str) -> Iterator[Variant]:
    size = dropout.LAUNCH["BLOCK"]
    yield Variant("", dropout.LAUNCH, dots=False, elements=size, quick=True)


def _dequant(dtype: str) -> Iterator[Variant]:
    fixed = {"QBLOCK": 64, "ROUND": nf4.TL_DTYPE[DTYPES[dtype]], "BLOCKS": nf4.TILE // 64}
    for name, nested in (_FLAT, _NESTED):
        yield Variant(
            name, fixed | nf4.LAUNCH | {"NESTED_BLOCK": nested}, _absmax(nested), dots=False,
            elements=nf4.TILE, decodes=True, quick=True,
        )  # fmt: skip


def _dequant_group(dtype: str) -> Iterator[Variant]:
    for variant in _dequant(dtype):
        types = {
            f"{name}{suffix}": type_
            for name, type_ in variant.types.items()
            for suffix in ("", "_1", "_2")
        }
        yield variant._replace(types=types)


def _weight_types(suffix: str) -> str:
    stats = ", ".join(f"{part}{suffix}" for part in _STATS.split(", "))
    size = f"bytes{suffix}" if suffix else "numel_bytes"
    return f"*u8 packed{suffix}, {stats}, *D out{suffix}, i32 numel{suffix}, i32 {size}"


def _gemm(transposed: bool) -> Callable[[str], Iterator[Variant]]:
    def variants(dtype: str) -> Iterator[Variant]:
        for pairs in (False, True) if DTYPES[dtype].itemsize == 2 else (False,):
            size = gemm(transposed, DTYPES[dtype].itemsize)
            fixed = size.launch() | {"QBLOCK": 64, "ROUND": nf4.TL_DTYPE[DTYPES[dtype]]}
            for tokens in sorted({16, size.tokens}):
                for name, nested in (_NESTED,) if pairs else (_FLAT, _NESTED):
                    for whole in (None,) if transposed else (True, False)[: 1 + bool(nested)]:
                        yield Variant(
                            f"{tokens} tokens {name}{' pairs' if pairs else ''}"
                            f"{' ragged n' if whole is False else ''}",
                            fixed | {"TOKENS": tokens, "NESTED_BLOCK": nested, "PAIRS": pairs}
                            | ({} if transposed else {"WHOLE": whole}),
                            _absmax(nested), elements=size.out * size.depth,
                            # in fp32 most instructions multiply
                            decodes=whole is not False and dtype != "fp32",
                            limit=PAIR_LIMIT if pairs else DECODE_LIMIT,
                            quick=bool(nested) and whole is not False,
                        )  # fmt: skip

    return variants


def _skinny(kernel: str, drops: tuple[bool, ...] = (False, True)) -> Any:
    def variants(dtype: str) -> Iterator[Variant]:
        for rank in _RANKS:
            size = TILES[kernel][DTYPES[dtype].itemsize][rank]
            for drop in drops:
                more = {"DROP": drop} if len(drops) == 2 else {}
                yield Variant(
                    f"rank {rank}{' dropout' if drop else ''}",
                    size.launch() | more | {"RANK": rank}, _seed(drop, dtype),
                    elements=size.rows * size.columns, quick=rank == 16 and drop == drops[-1],
                )  # fmt: skip

    return variants


_TABLES = {"TILE": TILE, "ADAPTER": ADAPTER}


def _mixed(kernel: str, drops: tuple[bool, ...] = (False, True)) -> Any:
    """As the kernel for one adapter, with the tables that are looked up."""

    def variants(dtype: str) -> Iterator[Variant]:
        for one in _skinny(kernel, drops)(dtype):
            seeds = {"seeds": f"*{dtype}"} if one.types else {}
            yield one._replace(fixed=one.fixed | _TABLES, types=seeds)

    return variants


def _mixed_up(dtype: str) -> Iterator[Variant]:
    for one in _input_grad(dtype):
        seeds = {"seeds": f"*{dtype}"} if one.types else {}
        for scaled in (False, True)[: 1 if one.fixed["DROP"] else 2]:
            yield one._replace(
                name=f"{one.name}{' scaled' if scaled else ''}",
                fixed=one.fixed | _TABLES | {"SCALED": scaled}, types=seeds,
            )  # fmt: skip


def _input_grad(dtype: str) -> Iterator[Variant]:
    size, step = INPUT_GRAD[DTYPES[dtype].itemsize]
    for ranks in (r for r in _RANKS if r <= step):
        for drop in (False, True):
            yield Variant(
                f"rank {ranks}{' dropout' if drop else ''}",
                size.launch() | {"DROP": drop, "RANKS": ranks}, _seed(drop, dtype),
                elements=size.rows * size.columns, quick=ranks == 16 and drop,
            )  # fmt: skip


def _row_norm(dtype: str) -> Iterator[Variant]:
    for rank, size in TILES["row_norm"][DTYPES[dtype].itemsize].items():
        fixed = size.launch() | {"RANK": rank, "ROUND": nf4.TL_DTYPE[DTYPES[dtype]]}
        elements = size.rows * size.columns
        yield Variant(
            f"rank {rank} dense",
            fixed | {"PACKED": False, "ALIGNED": False, "QBLOCK": 1, "NESTED_BLOCK": 0},
            {"stride_column": "1"}, elements=elements, quick=rank == 16,
        )  # fmt: skip
        for name, nested in (_FLAT, _NESTED):
            for aligned in (True, False)[: 1 + bool(nested)]:
                unit = {"w": "*i32" if aligned else "*u8"}
                yield Variant(
                    f"rank {rank} {name}{'' if aligned else ' unaligned'}",
                    fixed | {"PACKED": True, "ALIGNED": aligned, "QBLOCK": 64,
                             "NESTED_BLOCK": nested, "enable_fp_fusion": False},
                    unit | _absmax(nested), elements=elements,
                    quick=rank == 16 and aligned and bool(nested),
                )  # fmt: skip


def _row_norm_again(dtype: str) -> Iterator[Variant]:
    """Without a product on tensor cores: what is added up again is so in fp32."""
    first = next(iter(TILES["row_norm"][DTYPES[dtype].itemsize]))
    for one in _row_norm(dtype):
        if one.name.startswith(f"rank {first} "):
            fixed = {k: v for k, v in one.fixed.items() if k != "RANK"}
            fusion = {k: v for k, v in fixed.items() if k == "enable_fp_fusion"}
            yield one._replace(
                name=one.name.removeprefix(f"rank {first} "),
                fixed=fixed | NORM_AGAIN.launch() | {"RANKS": 16} | fusion, dots=False, elements=0,
            )  # fmt: skip


def _scale_fwd(dtype: str) -> Iterator[Variant]:
    for flat, launch in scale.LAUNCH.items():
        for more in (False, True):
            yield Variant(
                f"{'channels' if flat else 'rows'} side by side{' shift rest' if more else ''}",
                launch | {"FLAT": flat, "SHIFT": more, "REST": more},
                ({"inner": "1"} if flat else {}) | ({} if more else {"shift": f"*{dtype}"}),
                dots=False, elements=launch["ROWS"] * launch["COLUMNS"], quick=flat and more,
            )  # fmt: skip


def _scale_bwd(dtype: str) -> Iterator[Variant]:
    for flat, launch in scale.LAUNCH.items():
        yield Variant(
            f"{'channels' if flat else 'rows'} side by side",
            launch | {"FLAT": flat, "DX": True, "DV": True, "DSHIFT": True},
            {"inner": "1"} if flat else {}, dots=False,
            elements=launch["ROWS"] * launch["COLUMNS"], quick=flat,
        )  # fmt: skip


_BLOCKS = (4, 32, 48, 256)
"""Packed; packed whole; with a rest; cut into tiles."""


def _rotate_fwd(dtype: str) -> Iterator[Variant]:
    tile = ROTATE[DTYPES[dtype].itemsize]
    for size, pack, whole in _packs(tile.columns):
        for turned in (False, True):
            for apart in (1, 2)[: 2 - turned]:
                yield Variant(
                    f"blocks of {size}{' apart' if apart > 1 else ''}"
                    f"{' turned' if turned else ''}",
                    tile.launch() | {"SIZE": size, "PACK": pack, "WHOLE": whole, "APART": apart,
                                     "TURNED": turned},
                    elements=tile.rows * tile.columns, quick=size == 32 and not turned,
                )  # fmt: skip


def _rotate_bwd(dtype: str) -> Iterator[Variant]:
    tile = ROTATE_GRAD[DTYPES[dtype].itemsize]
    for size, pack, whole in _packs(tile.columns):
        for apart in (1, 2):
            yield Variant(
                f"blocks of {size}{' apart' if apart > 1 else ''}",
                tile.launch() | {"SIZE": size, "PACK": pack, "WHOLE": whole, "APART": apart,
                                 "DX": size <= tile.columns, "DD": True},
                elements=tile.rows * tile.columns, quick=size == 32,
            )  # fmt: skip


def _packs(columns: int) -> Iterator[tuple[int, int, bool]]:
    """(block size, blocks of a unit, whether tiles end where units do)."""
    for size in _BLOCKS:
        pack = max(1, columns // size)
        yield size, pack, pack * size % columns == 0


def _reflect(dtype: str) -> Iterator[Variant]:
    size, step = REFLECT[DTYPES[dtype].itemsize]
    for ranks in (r for r in _RANKS if r <= step):
        yield Variant(
            f"rank {ranks}", size.launch() | {"RANKS": ranks}, elements=size.rows * size.columns,
            quick=ranks == 16,
        )  # fmt: skip


def _absmax(nested: int) -> dict[str, str]:
    return {"absmax": "*u8"} if nested else {}


def _seed(drop: bool, dtype: str) -> dict[str, str]:
    """Where nothing is dropped, the launcher hands in another tensor for the seed."""
    return {} if drop else {"seed": f"*{dtype}"}


ROWS = (
    Row(dropout.dropout_fwd_kernel,
        "*D x, *i64 seed, *D y, i32 numel, i32? threshold, fp32 scale", _dropout),
    Row(nf4.nf4_dequant_kernel,
        f"*u8 packed, {_STATS}, *D out, i32 numel, i32 numel_bytes", _dequant),
    Row(nf4.nf4_dequant_group_kernel,
        ", ".join(_weight_types(suffix) for suffix in ("", "_1", "_2"))
        + ", i32? first_1, i32? first_2", _dequant_group),
    Row(nf4_gemm.nf4_gemm_fwd_kernel,
        f"*D x, *i32 words, {_STATS}, *fp32 parts, i32? m, i32 n, i32 k, i32 stride_x, i32? depth",
        _gemm(True)),
    Row(nf4_gemm.nf4_gemm_bwd_kernel,
        f"*D g, *i32 words, {_STATS}, *fp32 parts, i32? m, i32 n, i32 k, i32 stride_g, i32? depth",
        _gemm(False)),
    Row(low_rank.down_kernel,
        "*D x, *D a, *i64 seed, *fp32 parts, i32? m, i32 k, i32 r, i32 stride_x, i32? threshold, "
        "fp32 scale, i32? depth", _skinny("down")),
    Row(low_rank.up_grad_kernel,
        "*D g, *D u, *D b, *fp32 du_parts, *fp32 db_parts, i32? m, i32 n, i32 r, i32 stride_g, "
        "i32? depth", _skinny("up_grad", (False,))),
    Row(low_rank.down_grad_kernel,
        "*D x, *D du, *i64 seed, *fp32 parts, i32? m, i32 k, i32 r, i32 stride_x, i32? threshold, "
        "fp32 scale, i32? depth", _skinny("down_grad")),
    Row(low_rank.input_grad_kernel,
        "*D du, *D a, *i64 seed, *D dx, i32? m, i32 k, i32 r, i32? threshold, fp32 scale",
        _input_grad),
    Row(low_rank_mixed.mixed_down_kernel,
        "*D x, *D w, *i64 seeds, *i32 tiles, *i32 adapters, *fp32 factors, *fp32 parts, i32? m, "
        "i32 k, i32? r, i32 stride_x, i32? depth", _mixed("mixed_down")),
    Row(low_rank_mixed.mixed_up_kernel,
        "*D u, *D w, *i64 seeds, *i32 tiles, *i32 adapters, *fp32 factors, *D y, i32 n, i32? r",
        _mixed_up),
    Row(low_rank_mixed.mixed_up_grad_kernel,
        "*D g, *D u, *D w, *i32 tiles, *i32 adapters, *fp32 factors, *fp32 du_parts, "
        "*fp32 db_parts, i32? m, i32 n, i32? r, i32? total, i32 stride_g, i32? depth",
        _mixed("mixed_up_grad", (False,))),
    Row(low_rank_mixed.mixed_down_grad_kernel,
        "*D x, *D du, *i64 seeds, *i32 tiles, *i32 adapters, *fp32 factors, *fp32 parts, i32 k, "
        "i32? r, i32? total, i32 stride_x, i32? depth", _mixed("down_grad")),
    Row(row_norm.row_norm_kernel,
        f"*D w, {_STATS}, *D a, *fp32 b, *fp32 gram_b, *fp32 parts, i32 n, i32 k, i32 r, "
        "i32 stride_row, i32 stride_column, fp32 scale", _row_norm),
    Row(row_norm.row_norm_again_kernel,
        f"*fp32 parts, *D w, {_STATS}, *fp32 a, *fp32 b, *fp32 norm, i32 n, i32 k, i32 r, "
        "i32? chunks, i32 stride_row, i32 stride_column, fp32 scale", _row_norm_again),
    Row(rotate.rotate_fwd_kernel,
        "*D x, *fp32 d, *D y, i32? m, i32 k, i32? count, i32 stride_x", _rotate_fwd),
    Row(rotate.rotate_bwd_kernel,
        "*D g, *D x, *fp32 d, *D dx, *fp32 parts, i32? m, i32 k, i32? count, i32 stride_g, "
        "i32 stride_x, i32? depth", _rotate_bwd),
    Row(reflect.reflect_kernel,
        "*D x, *D u, *D w, *D y, i32? m, i32 k, i32 r, i32 stride_x", _reflect),
    Row(scale.scale_fwd_kernel,
        "*D x, *fp32 v, *fp32 shift, *D rest, *D y, i32? rows, i32 c, i32? inner", _scale_fwd),
    Row(scale.scale_bwd_kernel,
        "*D g, *D x, *fp32 v, *D dx, *fp32 dv_parts, *fp32 dshift_parts, i32? rows, i32 c, "
        "i32? inner, i32? depth", _scale_bwd),
)  # fmt: skip
