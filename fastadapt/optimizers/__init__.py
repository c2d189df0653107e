# SPDX-License-Identifier: Apache-2.0
"""Optimisers that belong to LoRA: one file each, over the parameters of any adapted model."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "create_loraplus_optimizer": "loraplus",
    "create_lorafa_optimizer": "lorafa",
    "LoraFAOptimizer": "lorafa",
    "create_riemannian_optimizer": "riemannian",
}

__all__ = [*_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastadapt.optimizers' has no attribute {name!r}")
    return getattr(import_module(f"fastadapt.optimizers.{_HOME[name]}"), name)
