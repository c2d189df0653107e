# SPDX-License-Identifier: Apache-2.0
"""Several LoRA adapters as one:  s' B' A'  from  sum_i w_i s_i B_i A_i,  with s' = 1.

cat:   A' = [w_1 s_1 A_1; ..], B' = [B_1, ..]: exact, the ranks add up
svd:   the best approximation of the (pruned, elected) sum of the deltas
sums:  A' = sum_i sqrt|w_i s_i| A_i, B' likewise, the sign on A: rough, as PEFT defines it

Biases of B are summed exactly. DoRA's magnitudes are no part of a pair: their deltas (W' - W) go
through an SVD, and the result is plain LoRA.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastadapt.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from fastadapt.base import Base
    from fastadapt.combine import Recipe

_METHODS = ("lora", "dora")


def combined_config(configs: list[Any], recipe: Recipe) -> Any:
    """The configuration of the result. Raises ConfigError for ranks that do not fit."""
    ranks = [max(c.r, *c.rank_pattern.values(), 0) for c in configs]
    if recipe.how == "cat":
        rank = sum(ranks)
    elif recipe.svd:
        rank = recipe.rank or max(ranks)
    elif len(set(ranks)) == 1:
        rank = ranks[0]
    else:
        raise ConfigError(
            "All adapters must have the same r value when using combination_type linear, ties, "
            f"dare_ties, dare_linear or magnitude_prune; got {ranks}: use cat or a type with svd"
        )
    first = configs[0]
    start = first.init_lora_weights if isinstance(first.init_lora_weights, bool) else True
    return dataclasses.replace(
        first, r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False,
        use_dora=False, init_lora_weights=start, lora_bias=any(c.lora_bias for c in configs),
        bias="none",
    )  # fmt: skip


def combine(made: Any, sources: list[tuple[Any, float]], recipe: Recipe, base: Base) -> None:
    """Fill the pair of ``made`` from weighted adapters of the same layer."""
    for source, _ in sources:
        if source.name not in _METHODS or (source.name == "dora" and not recipe.svd):
            raise UnsupportedError(
                f"combination_type={recipe.how!r} of a {source.name} adapter: its update is not "
                "s B A alone; use a type with svd" if source.name in _METHODS else
                f"add_weighted_adapter: a {source.name} adapter has no pair to combine"
            )  # fmt: skip
    a, b = made.pair()
    with torch.no_grad():
        found = _svd(sources, recipe, base, a.shape[0]) if recipe.svd else _pairs(sources, recipe)
        for target, values in zip((a, b), found, strict=True):
            flat = target.zero_().view(target.shape[0], -1)
            values = values.reshape(values.shape[0], -1)
            # a layer whose own ranks are lower leaves the rest zero
            flat[: values.shape[0], : values.shape[1]] = values.to(target)
        biases = [(s["lora_B"].bias * s["scaling"], w) for s, w in sources if s["lora_bias"]]
        if made["lora_bias"]:
            total = sum((bias * w for bias, w in biases), torch.zeros(()))
            made["lora_B"].bias.copy_(torch.as_tensor(total).expand_as(made["lora_B"].bias))


def _pairs(sources: list[tuple[Any, float]], recipe: Recipe) -> tuple[Tensor, Tensor]:
    pairs = [s.pair() for s, _ in sources]
    weights = [w * s["scaling"] for s, w in sources]
    if recipe.how == "cat":
        left = [a * w for (a, _), w in zip(pairs, weights, strict=True)]
        return torch.cat(left), torch.cat([b for _, b in pairs], 1)
    roots = [math.sqrt(abs(w)) for w in weights]
    signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
    return recipe.total([a for a, _ in pairs], signed), recipe.total([b for _, b in pairs], roots)


def _svd(
    sources: list[tuple[Any, float]], recipe: Recipe, base: Base, rank: int
) -> tuple[Tensor, Tensor]:
    deltas, weights = [], [w for _, w in sources]
    for source, _ in sources:
        if source.name == "lora":
            deltas.append(source.delta())
        else:
            w, _ = base.read()
            merged, _ = source.merged(w, None)
            deltas.append(merged - w.to(merged.dtype))
    # pruned as the layer stores its weight: PEFT's draws
    total = recipe.total([base.orient(d) for d in deltas], weights)
    return recipe.factors(base.orient(total).flatten(1), rank)
