# SPDX-License-Identifier: Apache-2.0
"""How a layer applies a weight: one file a kind. The first kind that claims a layer serves it."""

from __future__ import annotations

from torch import nn

from fastadapt.kinds.conv import Conv
from fastadapt.kinds.conv1d import Conv1dGpt2
from fastadapt.kinds.embedding import Embedding
from fastadapt.kinds.kind import Kind
from fastadapt.kinds.linear import Linear
from fastadapt.kinds.norm import Norm
from fastadapt.kinds.parameter import Attention, Parameter

__all__ = ["KINDS", "Attention", "Kind", "Parameter", "kind_of"]

KINDS: tuple[type[Kind], ...] = (Linear, Conv1dGpt2, Embedding, Conv, Norm)


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind that serves ``layer``, or None."""
    return next((kind(layer) for kind in KINDS if kind.claims(layer)), None)
