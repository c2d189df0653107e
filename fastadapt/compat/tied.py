# SPDX-License-Identifier: Apache-2.0
"""What transformers' models say of themselves: tied modules, and layers that stay on one device."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastadapt.tying import tied_with_embedding


def _get_module_names_tied_with_embedding(model: Any) -> list[str]:
    """Paths in the base model of the modules whose weight is the input embedding's; none where
    the config says ``tie_word_embeddings=False``. Adapted layers are named as they are now."""
    base: Any = model
    while hasattr(base, "adapter_root") and base.adapter_root is not base:
        base = base.adapter_root
    return tied_with_embedding(base)


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
