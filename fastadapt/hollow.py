# SPDX-License-Identifier: Apache-2.0
"""Adapters whose parameters have no memory until a state dict is set (``low_cpu_mem_usage``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import inject
from fastadapt.layer import AdaptedLayer


def hollow(model: nn.Module, name: str) -> None:
    """Move the parameters of an adapter to the meta device; constants stay."""
    _replace(model, name, lambda p, _: p.detach().to("meta"), lambda m, _: m.to("meta"))


def materialise(model: nn.Module, name: str) -> None:
    """Give those on the meta device memory, on the device of their layer."""

    def module(part: nn.Module, device: torch.device) -> None:
        if any(p.is_meta for p in part.parameters()):
            part.to_empty(device=device)

    _replace(model, name, lambda p, at: torch.empty_like(p, device=at) if p.is_meta else p, module)


def _replace(
    model: nn.Module,
    name: str,
    parameter: Callable[[Tensor, torch.device], Tensor],
    module: Callable[[nn.Module, torch.device], Any],
) -> None:
    # a parameter that layers share is replaced by one
    made: dict[int, Any] = {}
    for holder, device in _holders(model, name):
        part = holder[name]
        if isinstance(part, nn.Module):
            module(part, device)
            continue
        if id(part) not in made:
            new = parameter(part, device)
            fresh = part if new is part else nn.Parameter(new.detach(), part.requires_grad)
            # the old one is kept too, so that its id stays its own
            made[id(part)] = part, fresh
        holder[name] = made[id(part)][1]


def _holders(model: nn.Module, name: str) -> Iterator[tuple[Any, torch.device]]:
    for _, layer in inject.adapted(model):
        if isinstance(layer, AdaptedLayer):
            for key in layer.adapter_layer_names:
                if name in getattr(layer, key):
                    yield getattr(layer, key), layer.frozen.weight.device
