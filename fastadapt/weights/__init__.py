# SPDX-License-Identifier: Apache-2.0
"""How a frozen weight is stored: one file a format. The first that claims a layer serves it."""

from __future__ import annotations

from torch import nn

from fastadapt.weights.bnb import Bnb4bit, Bnb8bit
from fastadapt.weights.dense import DenseParameter, DenseWeight
from fastadapt.weights.weight import Weight

__all__ = ["FORMATS", "DenseParameter", "Weight", "format_of"]

FORMATS: tuple[type[Weight], ...] = (Bnb4bit, Bnb8bit, DenseWeight)


def format_of(layer: nn.Module) -> Weight | None:
    """The format that serves ``layer``, or None."""
    return next((fmt(layer) for fmt in FORMATS if fmt.claims(layer)), None)
