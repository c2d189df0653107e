# SPDX-License-Identifier: Apache-2.0
"""A batch whose rows go through adapters of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import LifecycleError

BASE_NAME = "__base__"
"""In ``adapter_names``: this row takes no adapter."""


class Rows(NamedTuple):
    """names: the adapter of each row; repeat: how often a row may stand in a batch (for beams)."""

    names: Sequence[str]
    repeat: int = 1

    def of(self, x: Tensor) -> Sequence[str]:
        """The names of the rows of x. A decoder's rows are repeated, those of its encoder are not.

        Raises LifecycleError for a batch of another length."""
        names, count = self.names, x.shape[0]
        if self.repeat > 1 and count == self.repeat * len(names):
            return [n for n in names for _ in range(self.repeat)]
        if count != len(names):
            raise LifecycleError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {count} respectively."
            )
        return names


def through(layer: Any, x: Tensor, rows: Rows, args: tuple[Any, ...], kwargs: Any) -> Tensor:
    """x through an AdaptedLayer, the rows of one adapter together."""
    if layer.merged:
        raise LifecycleError(
            "Cannot pass `adapter_names` when there are merged adapters, please call "
            "`unmerge_adapter` first."
        )
    names = rows.of(x)
    if not names:
        return layer.stack([], args, kwargs)(x)  # type: ignore[no-any-return]
    groups = grouped(names, layer.adapters)
    one_product = None if args or kwargs else _one_product(layer, x, list(groups), names)
    if one_product is not None:
        return one_product
    places = [torch.tensor(rows, device=x.device) for rows in groups.values()]
    parts = []
    for name, place in zip(groups, places, strict=True):
        layer.group = groups[name]
        try:
            parts.append(layer.stack([name], args, kwargs)(x.index_select(0, place)))
        finally:
            layer.group = None
    return torch.cat(parts).index_select(0, torch.cat(places).argsort())


def grouped(names: Iterable[str], known: Any) -> dict[str, list[int]]:
    """Adapter -> its rows; rows of adapters that are not ``known`` are the base's."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name if name in known else BASE_NAME, []).append(i)
    return groups


def _one_product(layer: Any, x: Tensor, groups: list[str], names: Sequence[str]) -> Tensor | None:
    """All rows through one product with the base, where every adapter is a low-rank pair."""
    frozen = layer.frozen
    if frozen.indexed or len(frozen.shape) != 2:
        return None
    held = [layer.adapters[name] for name in groups if name in layer.adapters]
    pairs = [pair for pair in (a.low_rank_pair() for a in held) if pair is not None]
    if len(pairs) < len(held):
        return None
    place = {name: i for i, name in enumerate(n for n in groups if n in layer.adapters)}
    mixed: Tensor = frozen.low_rank_mixed(x, pairs, [place.get(name, -1) for name in names])
    return mixed
