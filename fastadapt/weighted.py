# SPDX-License-Identifier: Apache-2.0
"""A new adapter out of several that a model has: ``add_weighted_adapter``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastadapt import inject
from fastadapt.adapter import Adapter
from fastadapt.combine import Recipe
from fastadapt.errors import ConfigError, LifecycleError, UnsupportedError
from fastadapt.layer import AdaptedLayer
from fastadapt.methods import method_of
from fastadapt.modules_to_save import ModulesToSaveWrapper


def plan(
    model: nn.Module, configs: dict[str, Any], adapters: Sequence[str], recipe: Recipe
) -> inject.Plan:
    """Plan the combined adapter, leaving the model alone.

    Raises LifecycleError (no such adapter, two copies of one module), ConfigError (methods,
    targets or ranks that do not fit) and UnsupportedError (a method without such arithmetic)."""
    if not adapters:
        raise LifecycleError("add_weighted_adapter: Found no adapter matching the names in []")
    for name in adapters:
        if name not in configs:
            raise LifecycleError(f"Adapter {name} does not exist; there are {list(configs)}")
    chosen = [configs[name] for name in adapters]
    types = {str(getattr(c.peft_type, "value", c.peft_type)) for c in chosen}
    if len(types) > 1:
        raise ConfigError(f"add_weighted_adapter: expected adapters of one method, got {types}")
    ours = [n for n in adapters if getattr(configs[n], "target_parameters", None)]
    if ours:
        raise UnsupportedError(
            "add_weighted_adapter does not support targeting nn.Parameter (problematic adapter "
            f"'{ours[0]}')"
        )
    twice = [
        path for path, layer in inject.adapted(model) if isinstance(layer, ModulesToSaveWrapper)
        and sum(name in layer.modules_to_save for name in adapters) > 1
    ]  # fmt: skip
    if twice:
        raise LifecycleError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, "
            f"but found {len(twice)} such instance(s): {twice}"
        )
    whole = {m for c in chosen for m in c.modules_to_save or ()}
    new = method_of(types.pop()).combined_config(chosen, recipe)
    new = dataclasses.replace(
        new, target_modules=_targets(chosen), modules_to_save=sorted(whole) or None
    )
    return inject.plan(model, new)


def fill(
    model: nn.Module, name: str, adapters: Sequence[str], weights: Sequence[float], recipe: Recipe
) -> None:
    """Give the attached adapter its values, frozen as PEFT has it."""
    for _, layer in inject.adapted(model):
        if isinstance(layer, ModulesToSaveWrapper):
            for source in adapters:
                if source in layer.modules_to_save and name in layer.modules_to_save:
                    values = layer.modules_to_save[source].state_dict()
                    layer.modules_to_save[name].load_state_dict(values)
        elif isinstance(layer, AdaptedLayer) and name in layer.adapters:
            pairs = zip(adapters, weights, strict=True)
            sources: list[tuple[Adapter, float]] = [
                (layer.adapters[source], w) for source, w in pairs if source in layer.adapters
            ]
            layer.adapters[name].combine(sources, recipe, layer.frozen)
        layer.set_requires_grad(name, False)


def _targets(configs: list[Any]) -> Any:
    """The union of what the adapters target."""
    kinds = {str if isinstance(c.target_modules, str) else set for c in configs}
    if len(kinds) > 1:
        raise ConfigError(
            "all adapter configs should follow the same target modules type. Combining adapters "
            "with `target_modules` type being a mix of list/set and string is not supported."
        )
    if kinds == {str}:
        return "|".join(f"({c.target_modules})" for c in configs)
    return {t for c in configs for t in c.target_modules or ()}
