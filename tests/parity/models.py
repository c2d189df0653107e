# SPDX-License-Identifier: Apache-2.0
"""The models of the method cases: those of ``tiny``, nets of convolutions, experts
and attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import tiny

TASKS = {"llama": "CAUSAL_LM", "tied": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}


class ConvNet(nn.Module):
    """x: (rows, 4, 9, 9) through a layer of each kind -> (rows, 6)."""

    inputs = (5, 4, 9, 9)

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


class Stacks(nn.Module):
    """Three experts as stacks of matrices, of which ``gate`` (3, 10) mixes the outputs."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = ((3, 10, 14), (3, 14, 10)) if transposed else ((3, 14, 10), (3, 10, 14))
        self.gate = nn.Parameter(torch.randn(3, 10) / 3)
        self.up, self.down = (nn.Parameter(torch.randn(s) / 3) for s in (up, down))
        self.post = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.is_transposed else w.mT for w in (self.up, self.down))
        each = F.silu(x @ up) @ down
        y: Tensor = self.post((each * F.linear(x, self.gate).softmax(1).t()[..., None]).sum(0))
        return y


class ExpertNet(nn.Module):
    """x: (rows, 10) through experts of both orientations -> (rows, 6)."""

    inputs = (8, 10)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Stacks(False), Stacks(True)])
        self.head = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.head(x)
        return y


class AttentionNet(nn.Module):
    """x: (rows, 5, 8) through nn.MultiheadAttention, alone and in an encoder layer -> (rows, 6)."""

    inputs = (3, 5, 8)

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)
        nn.init.normal_(self.mha.out_proj.bias)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        h = self.mha(h, h, h, need_weights=False)[0].transpose(0, 1) + x
        y: Tensor = self.head(self.encoder(h).mean(1))
        return y


NETS: dict[str, type[nn.Module]] = {
    "conv": ConvNet,
    "experts": ExpertNet,
    "attention": AttentionNet,
}
"""Kinds that are no model of transformers."""


def make(kind: str = "llama", fmt: str = "fp32") -> Any:
    """A fresh model, the same weights each time: a kind of ``tiny`` or of ``NETS``."""
    if kind not in NETS:
        return tiny.model(kind, fmt)
    torch.manual_seed(0)
    return NETS[kind]()


def run(model: Any, kind: str = "llama", seed: int = 3) -> Tensor:
    """The logits at a fixed batch."""
    if kind in NETS:
        y: Tensor = model(_inputs(kind, seed))
        return y
    batch = tiny.batch(kind, seed=seed)
    # without labels: PEFT's AdaLoRA cannot take them when its adapter is frozen
    logits: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return logits


def loss(model: Any, kind: str = "llama", seed: int = 3) -> Tensor:
    """The model's own loss, with what a method adds to it."""
    if kind in NETS:
        return model(_inputs(kind, seed)).square().mean()  # type: ignore[no-any-return]
    value: Tensor = model(**tiny.batch(kind, seed=seed)).loss
    return value


def _inputs(kind: str, seed: int) -> Tensor:
    shape: Any = NETS[kind].inputs
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
