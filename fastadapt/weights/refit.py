# SPDX-License-Identifier: Apache-2.0
"""Codes for a changed weight that keep the change.

Rounding W + D to the codes nearest to it loses D wherever D is small against the distance of two
codes: most values round back to what they were. Here row i is moved until it keeps all of D's row,

    <Q_i - W_i, D_i> >= ||D_i||^2,

at the least squared error: of the values that could step to the next code in the direction of D,
those with the least error for what they keep (a knapsack's greedy order, exact but for the last
item) do so.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22
"""How many values are sorted at once, in whole rows: 12 temporaries of them live together."""


def refit(before: Tensor, change: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Indices into ``levels``, (n, k) int64, of the values levels[i] * scale that stand for
    before + change.

    before, change: (n, k) float32; levels: (m,) ascending; scale: (n, 1) or (n, k), >= 0"""
    rows = max(1, CHUNK // max(1, before.shape[1]))
    return torch.cat([
        _rows(w, d, levels, s.expand_as(w))
        for w, d, s in zip(
            before.split(rows), change.split(rows), scale.expand(len(before), -1).split(rows),
            strict=True,
        )
    ])  # fmt: skip


def nearest(values: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """The index of the level nearest to each value / scale."""
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values / torch.where(scale > 0, scale, 1.0), middles)


def _rows(before: Tensor, change: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    target = before + change
    index = nearest(target, levels, scale)
    now = levels[index] * scale
    beside = index + change.sign().long()
    step = levels[beside.clamp(0, len(levels) - 1)] * scale - now
    gain = step * change
    cost = step * (step + 2 * (now - target))
    order = torch.where(gain > 0, cost / gain, torch.inf).argsort(1)
    kept = (gain * (gain > 0)).gather(1, order).cumsum(1)
    missing = (change * (target - now)).sum(1, keepdim=True)
    # a value steps when those before it did not suffice
    taken = torch.cat([torch.zeros_like(kept[:, :1]), kept[:, :-1]], 1) < missing
    steps = torch.zeros_like(taken).scatter(1, order, taken) & (gain > 0)
    return torch.where(steps, beside, index)
