# SPDX-License-Identifier: Apache-2.0
"""Losses that a method adds to the model's own (AdaLoRA's orthogonality), on either door.

A forward hook on the adapted model adds them to ``outputs.loss``, while the adapter is there and
trains; outputs without a loss pass as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastadapt import inject
from fastadapt.adapter import Adapter


class Penalty:
    """The hook of one adapter; it removes itself when the adapter is gone."""

    def __init__(self, name: str, config: Any) -> None:
        self.name, self.config = name, config
        self.handle: Any = None

    def __call__(self, model: nn.Module, args: Any, outputs: Any) -> Any:
        adapters = inject.adapters_of(model, self.name)
        if not adapters:
            self.handle.remove()
            return None
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, Tensor) and any(trains(a) for a in adapters.values()):
            cls = type(next(iter(adapters.values())))
            extra = cls.penalty(self.config, adapters)
            if extra is not None:
                outputs.loss = loss + extra.to(loss.device, loss.dtype)
        return None


def attach(root: nn.Module, name: str, made: inject.Plan) -> None:
    """Add the penalties of the adapter ``name``, where its method has one, to root's losses."""
    cls = type(next(iter(made.adapters.values())))
    if not any("penalty" in c.__dict__ for c in cls.__mro__ if c is not Adapter):
        return
    hook = Penalty(name, made.config)
    hook.handle = root.register_forward_hook(hook)


def detach(root: nn.Module) -> None:
    """Forget every penalty of ``root``."""
    for hook in [h for h in root._forward_hooks.values() if isinstance(h, Penalty)]:
        hook.handle.remove()


def trains(adapter: Any) -> bool:
    """A parameter of the adapter has gradients to come, in a layer whose adapters are on."""
    layer = adapter._layer
    if layer is None or layer.disable_adapters or adapter._key not in layer.active_adapters:
        return False
    parts = layer.parts_of(adapter._key).values()
    return any(
        p.requires_grad
        for part in parts
        for p in ([part] if isinstance(part, Tensor) else part.parameters())
    )
