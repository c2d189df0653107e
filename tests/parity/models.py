# SPDX-License-Identifier: Apache-2.0
"""The models of the method cases: those of ``tiny`` and a net of convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import tiny

TASKS = {"llama": "CAUSAL_LM", "tied": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}


class ConvNet(nn.Module):
    """x: (rows, 4, 9, 9) through a layer of each kind -> (rows, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.flat = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.point(F.silu(self.first(x))))
        h = F.silu(self.grouped(h) + h)
        y: Tensor = self.head(F.silu(self.flat(h.flatten(2))).mean(2))
        return y


def make(kind: str = "llama", fmt: str = "fp32") -> Any:
    """A fresh model, the same weights each time: a kind of ``tiny`` or "conv"."""
    if kind != "conv":
        return tiny.model(kind, fmt)
    torch.manual_seed(0)
    return ConvNet()


def run(model: Any, kind: str = "llama", seed: int = 3) -> Tensor:
    """The logits at a fixed batch."""
    if kind == "conv":
        y: Tensor = model(_images(seed))
        return y
    batch = tiny.batch(kind, seed=seed)
    # without labels: PEFT's AdaLoRA cannot take them when its adapter is frozen
    logits: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return logits


def loss(model: Any, kind: str = "llama", seed: int = 3) -> Tensor:
    """The model's own loss, with what a method adds to it."""
    if kind == "conv":
        return model(_images(seed)).square().mean()  # type: ignore[no-any-return]
    value: Tensor = model(**tiny.batch(kind, seed=seed)).loss
    return value


def _images(seed: int) -> Tensor:
    return torch.randn(5, 4, 9, 9, generator=torch.Generator().manual_seed(seed))
