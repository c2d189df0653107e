# SPDX-License-Identifier: Apache-2.0
"""What to compile ahead of time, one row a kernel: its argument types, its variants, its laws.

A row's variants take their tile sizes, warps and stages from the table that the launcher of the
kernel reads, so what is compiled here is what a GPU runs. ``bench/aot.py`` compiles the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from . import dropout, low_rank, nf4, row_norm

DTYPES = {"bf16": row_norm.tl.bfloat16, "fp16": row_norm.tl.float16, "fp32": row_norm.tl.float32}


class Build(NamedTuple):
    """One specialisation of a kernel.

    signature: argument -> type; ":16" divisible by 16, "1" the constant one; what is not named is
               a constexpr
    constants: constexpr -> value; options: of the compiler (num_warps, num_stages, ..)
    dots:      tl.dot is used and its operands fit tensor cores (fp32 in full precision does not)
    elements:  output or weight elements that one program (a loop: one round) works on
    decodes:   these elements are 4-bit codes
    default:   a size that models have; the others exist so that any size runs
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    dots: bool = False
    elements: int = 0
    decodes: bool = False
    default: bool = True


class Row(NamedTuple):
    """signature: "type name, ..", D stands for the dtype; variants: dtype -> builds."""

    kernel: Any
    signature: str
    variants: Any
