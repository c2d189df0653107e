# SPDX-License-Identifier: Apache-2.0
"""BD-LoRA:  W' = W + s B A with A or B block-diagonal, so that a shard of a layer needs a block.

    A = diag(A_1 .. A_n), held as (r, in / n), or B = diag(B_1 .. B_n), held as (out, r / n)

Source: BD-LoRA (arXiv 2510.23346).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.lora import Lora, refuse_kind


@dataclass
class BdLoraConfig:
    """target_modules_bd_a, target_modules_bd_b: parts of the paths whose A or B has blocks;
    nblocks: n; match_strict: a path that is in neither is an error, not plain LoRA."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        fields.count(self, "nblocks")
        both = {*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())}
        if both:
            raise ConfigError(
                f"Found overlapping modules in target_modules_bd lists: {sorted(both)}"
            )


class Blocks(nn.Module):
    """``weight``: (out, in / n), the blocks under each other."""

    def __init__(self, n: int, rows: int, columns: int) -> None:
        super().__init__()
        if rows % n or columns % n:
            raise ConfigError(f"BD-LoRA: {rows} x {columns} is not divisible by {n} blocks")
        self.nblocks = n
        self.weight = nn.Parameter(torch.empty(rows, columns // n))

    def whole(self) -> Tensor:
        matrix: Tensor = torch.block_diag(*self.weight.chunk(self.nblocks))
        return matrix


class BdLora(Lora):
    name = "bdlora"

    def build(self, base: Base, shared: Any) -> None:
        refuse_kind(base, "use_bdlora", indexed=False)
        config, path, options = self.config, self.config.path, self.config.use_bdlora
        in_a = any(name in path for name in options.target_modules_bd_a or ())
        in_b = any(name in path for name in options.target_modules_bd_b or ())
        if in_a and in_b:
            raise ConfigError(f"Target {path} matches both A and B block-diagonal patterns")
        if options.match_strict and not (in_a or in_b):
            raise ConfigError(
                f"Target {path} matches neither A nor B block-diagonal patterns. If this is "
                "intentional, set match_strict=False in BdLoraConfig"
            )
        super().build(base, shared)
        out, width = base.shape
        if in_a:
            self.parts["lora_A"] = blocks = Blocks(options.nblocks, config.r, width)
            nn.init.kaiming_uniform_(blocks.weight)
        elif in_b:
            self.parts["lora_B"] = blocks = Blocks(options.nblocks, out, config.r)
            nn.init.zeros_(blocks.weight)

    def pair(self) -> tuple[Tensor, Tensor]:
        a, b = (self[f"lora_{part}"] for part in "AB")
        return (a.whole() if isinstance(a, Blocks) else a.weight), (
            b.whole() if isinstance(b, Blocks) else b.weight
        )
