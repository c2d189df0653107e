# SPDX-License-Identifier: Apache-2.0
"""A reference model for DPO and GRPO at no cost: a view of a patched model with adapters off."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from fastadapt.errors import LifecycleError
from fastadapt.model import Adapters


def reference(model: nn.Module) -> nn.Module:
    """A view that shares every tensor of ``model`` and runs it with adapters off, without grad.

    ``train()`` and ``eval()`` of the view do not reach the shared modules."""
    if not isinstance(model, Adapters):
        raise LifecycleError(f"expected a model that fastadapt adapted, got {type(model).__name__}")
    view: Any = object.__new__(_view_class(type(model)))  # type: ignore[arg-type]
    view.__dict__.update(model.__dict__)
    view.__dict__["_viewed"] = model
    return view  # type: ignore[no-any-return]


@cache
def _view_class(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._viewed.disable_adapter(), torch.no_grad():
            return nn.Module.__call__(self._viewed, *args, **kwargs)

    def train(self: Any, mode: bool = True) -> Any:
        return self

    members = {"__call__": call, "train": train, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members)
