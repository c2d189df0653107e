# SPDX-License-Identifier: Apache-2.0
"""PEFT's functions for the offsets of aLoRA; fastadapt's own models find them by themselves."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from fastadapt.errors import FastAdaptWarning
from fastadapt.invocation import find
from fastadapt.rows import BASE_NAME

_FIELD = "alora_invocation_tokens"
_KEY = "alora_offsets"


def calculate_alora_offsets(
    peft_config: dict[str, Any],
    active_adapter: str,
    input_ids: Tensor | None,
    adapter_names: list[str] | None = None,
) -> list[int | None]:
    """For each row of ``input_ids`` the distance from the last invocation of its adapter to the
    end; None for a row without one, or whose adapter is no aLoRA."""
    if input_ids is None:
        return []
    offsets: list[int | None] = []
    for i, row in enumerate(input_ids):
        name = adapter_names[i] if adapter_names and i < len(adapter_names) else active_adapter
        if name != BASE_NAME and name not in peft_config:
            _warn(f"Adapter '{name}' not found in peft_config. Using base model for row {i}.")
        tokens = getattr(peft_config.get(name), _FIELD, None)
        place = find(tokens, row.unsqueeze(0))[0] if tokens else None
        offsets.append(None if place is None else len(row) - place)
    return offsets


def is_alora_relevant_in_batch(model: Any, adapter_names: list[str] | None = None) -> bool:
    """The active adapter, or one of those named, is an aLoRA."""
    configs = [model.active_peft_config, *(model.peft_config.get(n) for n in adapter_names or ())]
    return any(getattr(config, _FIELD, None) for config in configs)


def get_alora_offsets_for_forward(
    model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """``kwargs`` with ``alora_offsets``, where an aLoRA is in the batch."""
    if not is_alora_relevant_in_batch(model, kwargs.get("adapter_names")):
        return kwargs
    if input_ids is None and inputs_embeds is not None and kwargs.get(_KEY) is None:
        _warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA "
            "for this forward pass."
        )
    return _with_offsets(model, input_ids, kwargs)


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """``kwargs`` with ``alora_offsets``, where an aLoRA is in the batch."""
    if not is_alora_relevant_in_batch(model, kwargs.get("adapter_names")):
        return kwargs
    first = next(iter(args), None)
    ids = kwargs.get("input_ids", first if isinstance(first, Tensor) else None)
    if ids is None and kwargs.get(_KEY) is None:
        _warn(
            "Cannot calculate aLoRA offsets during generate as input_ids are not available. "
            "Disabling aLoRA."
        )
    return _with_offsets(model, ids if ids is None or ids.dim() > 1 else ids.unsqueeze(0), kwargs)


def _with_offsets(model: Any, ids: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get(_KEY) is None:
        found = None
        if ids is not None:
            found = calculate_alora_offsets(
                model.peft_config, model.active_adapter, ids, kwargs.get("adapter_names")
            )
        kwargs[_KEY] = found
    return kwargs


def _warn(text: str) -> None:
    warnings.warn(text, FastAdaptWarning, stacklevel=4)
