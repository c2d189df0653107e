# SPDX-License-Identifier: Apache-2.0
"""Which rows of a mixed batch belong to which adapter, as tables that kernels look up.

The index is known on the host. Its tables are copied to the device once and kept, so that a batch
laid out like an earlier one copies nothing and a CUDA graph can capture it.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

TILE = 4
"""Of a tile of rows: first row, end, adapter, which of the adapter's rows the first is."""
ADAPTER = 5
"""Of an adapter: first rank, ranks, threshold of its dropout, first tile, end of its tiles."""
_KEPT = 64
_plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()


class Plan:
    """The rows of each adapter, and its ranks, scale and dropout.

    ranks:  of each adapter; most: of all of them
    covers: every row has an adapter
    """

    def __init__(
        self, index: list[int], height: int, ranks: list[int], scale: list[float], p: list[float],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.ranks, self.most, self.covers = ranks, max(ranks), -1 not in index
        self._segments: list[list[tuple[int, int]]] = [[] for _ in ranks]
        for j, i in enumerate(index):
            if i < 0:
                continue
            mine = self._segments[i]
            if mine and mine[-1][1] == j * height:  # neighbouring blocks are one
                mine[-1] = (mine[-1][0], (j + 1) * height)
            else:
                mine.append((j * height, (j + 1) * height))
        self._thresholds = [round(q * 65536) for q in p]
        kept = [65536 / (65536 - t) for t in self._thresholds]
        self._factors = _on(device, list(zip(scale, kept, strict=True)), torch.float32)
        self._made: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._device = device

    def tiles(self, rows: int) -> Tensor:
        """int32 (tiles of at most ``rows`` rows, TILE), those of an adapter together."""
        return self._of(rows)[0]

    def tables(self, rows: int) -> tuple[Tensor, Tensor]:
        """int32 (adapters, ADAPTER), with the places in ``tiles(rows)``; float32 (adapters, 2): the
        scale, and what dropout keeps is multiplied by."""
        return self._of(rows)[1], self._factors

    def longest(self, rows: int) -> int:
        """The most tiles of one adapter, at least one."""
        return self._of(rows)[2]

    def _of(self, rows: int) -> tuple[Tensor, Tensor, int]:
        if rows not in self._made:
            tiles: list[tuple[int, ...]] = []
            adapters, longest, rank = [], 1, 0
            for i, segments in enumerate(self._segments):
                first, local = len(tiles), 0
                for start, end in segments:
                    tiles += [
                        (row, min(row + rows, end), i, local + row - start)
                        for row in range(start, end, rows)
                    ]
                    local += end - start
                found = (rank, self.ranks[i], self._thresholds[i], first, len(tiles))
                adapters.append(found)
                longest, rank = max(longest, len(tiles) - first), rank + self.ranks[i]
            self._made[rows] = (
                _on(self._device, tiles, torch.int32),
                _on(self._device, adapters, torch.int32),
                longest,
            )
        return self._made[rows]


def plan_of(
    index: list[int], height: int, ranks: list[int], scale: list[float], p: list[float],
    device: torch.device, rows: tuple[int, ...],
) -> Plan | None:  # fmt: skip
    """The plan, with its tables for tiles of ``rows``; None while a CUDA graph is captured whose
    layout no earlier batch had, since its tables would be those of the graph."""
    key = (tuple(index), height, tuple(ranks), tuple(scale), tuple(p), device)
    found = _plans.get(key)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        found = _plans[key] = Plan(index, height, ranks, scale, p, device)
        for size in rows:
            found.tiles(size)
        if len(_plans) > _KEPT:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return found


def _on(device: torch.device, values: list[tuple[float, ...]], dtype: torch.dtype) -> Tensor:
    """From pinned memory, so that the host does not wait."""
    held = torch.tensor(values, dtype=dtype)
    return held if device.type == "cpu" else held.pin_memory().to(device, non_blocking=True)
