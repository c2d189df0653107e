# SPDX-License-Identifier: Apache-2.0
"""Layers of a decoder or encoder repeated by ranges, their weights shared and their adapters not.

    [[0, 4], [2, 5]]  ->  layers 0 1 2 3 2 3 4

Source: SOLAR's depth up-scaling (arXiv 2312.15166), as PEFT's ``layer_replication`` has it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastadapt.errors import ConfigError, LifecycleError, UnsupportedError

_HOMES = (("layers",), ("encoder", "layer"), ("h",))
"""Where the list of layers is: Llama and its kin, Bert, Falcon and GPT-2."""


@dataclass(frozen=True)
class Replication:
    """``layers`` for ``owner.name``, not there yet; body: the module with the ``config``."""

    body: Any
    owner: nn.Module
    name: str
    layers: nn.ModuleList

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model has the layers inside."""
        before = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.layers)
        try:
            yield
        finally:
            setattr(self.owner, self.name, before)

    def install(self) -> None:
        setattr(self.owner, self.name, self.layers)
        config = getattr(self.body, "config", None)
        if hasattr(config, "num_hidden_layers"):
            config.num_hidden_layers = len(self.layers)  # type: ignore[union-attr]


def replicated(
    model: nn.Module, ranges: Sequence[Sequence[int]], others: Sequence[Any], has_adapters: bool
) -> Replication | None:
    """The replication that a configuration asks for; None where a model with adapters has it.

    others: what the adapters that the model has ask for. Raises UnsupportedError for a model
    without a known list of layers, ConfigError for ranges outside of it, LifecycleError for a
    model whose adapters stand on other layers."""
    asked = [tuple(r) for r in ranges]
    if has_adapters:
        if any(other is not None and [tuple(r) for r in other] == asked for other in others):
            return None
        raise LifecycleError(
            "layer_replication: the model has adapters, which stand on the layers that it has now; "
            "unload them first"
        )
    body: Any = model
    while hasattr(body, "model"):
        body = body.model
    body = getattr(body, "bert", getattr(body, "transformer", body))
    owner, name = _home(body)
    layers = getattr(owner, name)
    bad = [r for r in asked if len(r) != 2 or not 0 <= r[0] < r[1] <= len(layers)]
    if bad or not asked:
        raise ConfigError(
            f"layer_replication: expected ranges [start, end] within the {len(layers)} layers of "
            f"the model, got {bad or asked}"
        )
    new: list[nn.Module] = []
    for start, end in asked:
        for i in range(start, end):
            made = _clone(layers[i])
            for module in made.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = len(new)  # type: ignore[assignment]
            new.append(made)
    return Replication(body, owner, name, nn.ModuleList(new).train(layers.training))


def _home(body: Any) -> tuple[nn.Module, str]:
    for way in _HOMES:
        owner = body
        for step in way[:-1]:
            owner = getattr(owner, step, None)
        if isinstance(getattr(owner, way[-1], None), nn.ModuleList):
            return owner, way[-1]
    raise UnsupportedError(
        "Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon "
        "compatible architectures."
    )


def _clone(layer: nn.Module) -> nn.Module:
    """A copy of the modules with the same Parameters."""
    return copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
