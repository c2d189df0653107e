# SPDX-License-Identifier: Apache-2.0
"""PEFT's helpers over names: short targets, "all-linear", which keys belong to adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from torch import nn

from fastadapt import inject, targets
from fastadapt.compat.adapters import root_of
from fastadapt.errors import ConfigError
from fastadapt.layer import AdaptedLayer
from fastadapt.model import Adapters


def _find_minimal_target_modules(
    target_modules: Collection[str], other_module_names: Collection[str]
) -> set[str]:
    """The shortest names that select ``target_modules`` and none of the others.

    Raises ConfigError for a string, an empty collection or name, and a name on both sides."""
    if isinstance(target_modules, str) or not target_modules:
        raise ConfigError("target_modules should be a list or set of strings.")
    if "" in target_modules:
        raise ConfigError("target_modules should not contain an empty string.")
    if not set(target_modules).isdisjoint(other_module_names):
        raise ConfigError(
            "target_modules and other_module_names contain common elements, this should not "
            "happen, please open a GitHub issue at https://github.com/huggingface/peft/issues "
            "with the code to reproduce this issue"
        )
    return targets.shortest(target_modules, other_module_names)


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """The config with "all-linear" written out as names of layers; any other as it is."""
    wanted = peft_config.target_modules
    if not (isinstance(wanted, str) and wanted.lower() == targets.ALL_LINEAR):
        return peft_config
    names = {p.rpartition(".")[2] for p in inject.all_linear(model)}
    return dataclasses.replace(peft_config, target_modules=names)


def _get_tuner_state_dict_key_prefixes(
    model: nn.Module, adapter_name: str | None = None
) -> set[str]:
    """Beginnings of the state-dict keys of adapters, of all or of one; modules that are trained
    whole are not among them. Tensors that layers share are under their key in files, too."""
    root = root_of(model)
    before = {id(m): path for path, m in model.named_modules()}.get(id(root), "")
    found = set()
    for path, layer in inject.adapted(root):
        if not isinstance(layer, AdaptedLayer):
            continue
        for part in (*layer.adapter_layer_names, *layer.other_param_names):
            holder: Any = getattr(layer, part)
            if not isinstance(holder, nn.Module):
                continue
            names = [n for n in list(getattr(layer, part)) if adapter_name in (None, n)]
            ending = "" if adapter_name is None else f".{adapter_name}"
            for name in names:
                found.add(".".join(p for p in (before, path, part) if p) + ending)
                key = layer.adapters[name].file_key(part, "")
                if key is not None and key.startswith("/") and isinstance(model, Adapters):
                    found.add(f"base_model.{part}{ending}")
    return found


def _filter_state_dict_by_key_prefixes(
    state_dict: dict[str, Any], prefixes: set[str]
) -> dict[str, Any]:
    """The entries whose key is a prefix, or a prefix and a dot and more."""
    return {k: v for k, v in state_dict.items() if _ancestors(k) & prefixes}


def _ancestors(key: str) -> set[str]:
    parts = key.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
