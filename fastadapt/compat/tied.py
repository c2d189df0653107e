# SPDX-License-Identifier: Apache-2.0
"""What transformers' models say of themselves: tied modules, and layers that stay on one device."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fastadapt.errors import ConfigError

_INNER = re.compile(r"(?:token_adapter\.)?base_layer\.")


def _get_module_names_tied_with_embedding(model: Any) -> list[str]:
    """Paths in the base model of the modules whose weight is the input embedding's; none where
    the config says ``tie_word_embeddings=False``. Adapted layers are named as they are now."""
    base: Any = model
    while hasattr(base, "adapter_root") and base.adapter_root is not base:
        base = base.adapter_root
    keys = getattr(base, "_tied_weights_keys", None)
    if keys is None or getattr(getattr(base, "config", None), "tie_word_embeddings", None) is False:
        return []
    if not isinstance(keys, dict):
        return _owners(keys)
    if not hasattr(base, "get_input_embeddings"):
        raise ConfigError(
            "`_tied_weights_keys` is a dict: expected a model with get_input_embeddings, which "
            f"says whose weight is tied, got {type(base).__name__}"
        )
    ties = {}
    for path, module in base.named_modules():
        own = getattr(module, "_tied_weights_keys", None)
        if isinstance(own, dict):
            at = f"{path}." if path else ""
            ties.update({at + tied: at + source for tied, source in own.items()})
    wanted = {id(p) for p in base.get_input_embeddings().parameters()}
    every = base.named_parameters(remove_duplicate=False)
    now = {_INNER.sub("", name): name for name, p in every if id(p) in wanted}
    return _owners(now.get(tied, tied) for tied, source in ties.items() if source in now)


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """Class names of the layers that accelerate must not split over devices: the model's own
    list, and those of the models inside it."""
    found: set[str] = set()
    waiting = [model] if hasattr(model, "_no_split_modules") else []
    while waiting:
        module = waiting.pop()
        if type(module).__name__ not in found:
            found |= set(getattr(module, "_no_split_modules", None) or ())
            waiting += module.children()
    return found


def _owners(names: Any) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in names})
