# SPDX-License-Identifier: Apache-2.0
"""What other libraries must learn while a patched model lives, and forget after the last one."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch import nn

from fastadapt.layer import AdaptedLayer

_alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def entered(model: nn.Module) -> None:
    """A model was patched: Trainer learns to read its checkpoints, its loss is ``patch.loss``."""
    _alive.add(model)
    if any(c.__module__ == "transformers.modeling_utils" for c in type(model).__mro__):
        from fastadapt.patch import loss, trainer

        trainer.install()
        loss.enter(model)
    if "peft" in sys.modules:
        register_layers()


def left(model: nn.Module) -> None:
    """A model was given back: with the last one, Trainer is as it was."""
    _alive.discard(model)
    if "fastadapt.patch.loss" in sys.modules:
        sys.modules["fastadapt.patch.loss"].leave(model)
    if not _alive and "fastadapt.patch.trainer" in sys.modules:
        sys.modules["fastadapt.patch.trainer"].uninstall()


def register_layers() -> None:
    """Our layer counts as PEFT's for ``isinstance``, which TRL, diffusers and transformers ask."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: Any = BaseTunerLayer
    layers.register(AdaptedLayer)
