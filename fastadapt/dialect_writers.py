# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter of a model under the keys of Kohya's scripts or of diffusers; see ``dialects``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastadapt import inject, saving, slots
from fastadapt.dialects import DOWN, MAGNITUDE, UP, split_key
from fastadapt.errors import UnsupportedError


def kohya_state_dict(
    model: Any, adapter_name: str = "default", prefix: str = "lora_unet"
) -> dict[str, Tensor]:
    """A LoRA adapter of a model as Kohya's scripts name it; prefix: of the component."""
    made: dict[str, Tensor] = {}
    name = {DOWN: "lora_down.weight", UP: "lora_up.weight", MAGNITUDE: "dora_scale"}
    for path, adapter, parts in _of_model(model, adapter_name):
        stem = f"{prefix}_{path.replace('.', '_')}"
        for part, tensor in parts.items():
            if part == MAGNITUDE:
                tensor = tensor.reshape(-1, *[1] * (parts[UP].dim() - 1))
            made[f"{stem}.{name[part]}"] = tensor
        made[f"{stem}.alpha"] = torch.tensor(adapter["scaling"] * parts[DOWN].shape[0])
    return made


def diffusers_state_dict(
    model: Any, adapter_name: str = "default", prefix: str = "unet"
) -> dict[str, Tensor]:
    """A LoRA adapter of a model as diffusers reads it; prefix: of the component."""
    made: dict[str, Tensor] = {}
    for path, adapter, parts in _of_model(model, adapter_name):
        for part, tensor in parts.items():
            made[f"{prefix}.{path}.{part}"] = tensor
        made[f"{prefix}.{path}.alpha"] = torch.tensor(adapter["scaling"] * parts[DOWN].shape[0])
    return made


def _of_model(model: Any, name: str) -> Iterator[tuple[str, Any, dict[str, Tensor]]]:
    """(path, adapter, PEFT's part -> tensor) of every layer."""
    root = model.adapter_root
    config = model.peft_config[name]
    tensors = saving.adapter_state_dict(root, config, name, save_embedding_layers=False)
    by_path: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, part = split_key(key.removeprefix(slots.PREFIX))
        if part not in (DOWN, UP, MAGNITUDE):
            raise UnsupportedError(f"{key}: the dialect has no name for it")
        by_path.setdefault(stem, {})[part] = tensor.detach().cpu().contiguous()
    adapters = inject.adapters_of(root, name)
    for path, parts in by_path.items():
        yield path, adapters[path], parts
