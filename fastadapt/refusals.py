# SPDX-License-Identifier: Apache-2.0
"""What a configuration asks of a model that cannot be, or that would be without effect: refused
or reported while ``inject.plan`` has changed nothing."""

from __future__ import annotations

import warnings
from typing import Any

from fastadapt import targets
from fastadapt.adapter import Adapter
from fastadapt.base import FrozenLayer
from fastadapt.config import AdapterConfig
from fastadapt.errors import FastAdaptWarning, LifecycleError, TargetError, UnsupportedError
from fastadapt.parameter import Place

_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_FUSED = ("out_proj", "conv1d")


def report(
    config: AdapterConfig,
    modules: dict[str, Any],
    chosen: list[str],
    parameters: list[Place],
    allow_unmatched: bool,
) -> None:
    """Raise TargetError, or warn, where names, exclusions or patterns choose nothing."""
    absent = targets.unmatched(config, modules)
    # without anything chosen the reason is looked for, otherwise only exclusions can be in vain
    excluded = []
    if config.exclude_modules or not (chosen or parameters):
        test = targets.Matcher(config)
        excluded = [p for p in modules if test.excludes(p)]
    if not chosen and not parameters and excluded:
        if len(excluded) == len(modules):
            raise TargetError(
                "All modules were excluded. This is likely unintended. Check your "
                "`target_modules`, `exclude_modules` and `modules_to_save` configuration."
            )
        raise TargetError(
            "No modules were targeted for adaptation. This might be caused by a combination of "
            "mismatched target modules and excluded modules: check `target_modules`, "
            "`exclude_modules` and `modules_to_save`, whose modules are trained whole and take no "
            f"adapter. Excluded are {excluded[:5]}."
        )
    if config.exclude_modules and not excluded:
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were "
            "excluded. Please check that exclude_modules was set correctly.", stacklevel=4,
        )  # fmt: skip
    asked_parameters = getattr(config, "target_parameters", None)
    if not chosen and not parameters and not config.target_modules and asked_parameters:
        raise TargetError(
            "No `target_modules` passed but also no `target_parameters` found. Please check the "
            "values for these arguments."
        )
    if bool(chosen) != bool(parameters):
        name = "target_parameters" if chosen else "target_modules"
        if getattr(config, name, None):
            text = f"{name}={getattr(config, name)} were set but no {name[7:-1]} was matched."
            if not allow_unmatched:
                raise TargetError(text)
            warnings.warn(text, RuntimeWarning, stacklevel=4)
    if not chosen and not parameters:
        asked = config.target_modules
        near: dict[str, str | None] = {k: v for k, v in absent.items() if v}
        hint = f" Near: {targets.describe(near)}." if near else ""
        raise TargetError(
            f"Target modules {asked if isinstance(asked, str) else sorted(asked or [])} not found "
            "in the base model. Please check the target modules, excluded modules and layer "
            f"indices and try again.{hint}"
        )
    adapted_paths = [*chosen, *(place.name for place in parameters)]
    for kind, idle in targets.idle_patterns(config, adapted_paths).items():
        warnings.warn(
            f"The following {kind} keys did not match any targeted module and were ignored: "
            f"{idle}.", RuntimeWarning, stacklevel=4,
        )  # fmt: skip
    if absent:
        text = f"target_modules: no module is named {targets.describe(absent)}"
        if not allow_unmatched:
            raise TargetError(f"{text}; correct it, or pass allow_unmatched=True")
        warnings.warn(text, FastAdaptWarning, stacklevel=4)


def refuse_fused(model_type: str | None, config: AdapterConfig, chosen: list[str]) -> None:
    """Layers whose weight a fused kernel of the model reads, so that an adapter has no effect."""
    held = [p for p in chosen if p.rpartition(".")[2] in _FUSED]
    if model_type in _MAMBA and held:
        raise UnsupportedError(
            f"[PEFT:{config.peft_type}] Module '{held[0]}' is incompatible with Mamba-based models "
            f"(model_type='{model_type}'). Incompatible modules: {sorted(_FUSED)}. Please remove "
            "it from `target_modules` to avoid compatibility issues."
        )


def refuse_norms(method: type[Adapter], bases: dict[str, FrozenLayer]) -> None:
    """A norm has a vector, which most methods cannot adapt."""
    for path, base in bases.items():
        if base.kind.name == "norm" and not method.takes_norms:
            raise UnsupportedError(
                f"Target module {path} is not supported: {method.name} adapts a matrix, and "
                f"{type(base.layer).__name__} has a vector"
            )


def refuse_changes(modules: dict[str, Any], adapters: dict[str, Adapter]) -> None:
    """A start that takes a part out of the base would silently change what stands on it."""
    held = [
        (path, next(iter(modules[path].adapters)))
        for path, adapter in adapters.items()
        if adapter.changes_base and getattr(modules[path], "adapters", None)
    ]
    if held:
        path, other = held[0]
        raise LifecycleError(
            f"the start of this adapter (init_lora_weights="
            f"{getattr(adapters[path].config, 'init_lora_weights', None)!r}) takes a part of the "
            f"base weight into itself, which would change adapter {other!r} at {path} and "
            f"{len(held) - 1} more: unload that first, or save the new one as a plain LoRA with "
            "path_initial_model_for_weight_conversion and load that"
        )
