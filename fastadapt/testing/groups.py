# SPDX-License-Identifier: Apache-2.0
"""Cases of the grouped low-rank op: several layers over one x."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastadapt.testing.ops import LowRankCase, LowRankInputs


@dataclass(frozen=True, kw_only=True)
class GroupCase:
    """x: (m, k), shared  W_i: (n_i, k)  a_i: (r_i, k)  b_i: (n_i, r_i).

    members: (n, r, p, whether there is a bias) of each layer; the other fields as in LowRankCase
    """

    m: int = 17
    k: int = 64
    members: tuple[tuple[int, int, float, bool], ...] = (
        (48, 8, 0.0, True), (16, 1, 0.0, False), (33, 5, 0.0, True),
    )  # fmt: skip
    bits: str = "dense"
    dtype: torch.dtype = torch.float32
    pair: torch.dtype | None = None
    compute: torch.dtype | None = None
    layout: str = "rows"

    def __str__(self) -> str:
        shown = str(self.cases()[0]).replace("-p" + str(self.members[0][2]), "")
        parts = "_".join(f"{n}x{r}" + (f"p{p}" if p else "") for n, r, p, _ in self.members)
        return f"{shown}-{parts}"

    def cases(self) -> list[LowRankCase]:
        return [
            LowRankCase(
                m=self.m, k=self.k, n=n, r=r, p=p, bias=bias, bits=self.bits, dtype=self.dtype,
                pair=self.pair, compute=self.compute, layout=self.layout, scale=1.7 - 0.4 * i,
            )
            for i, (n, r, p, bias) in enumerate(self.members)
        ]  # fmt: skip

    def make(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, list[LowRankInputs]]:
        """x, and the inputs of each layer (whose own x is not used)."""
        made = [case.make(seed + i, device) for i, case in enumerate(self.cases())]
        return made[0].x, made
