# SPDX-License-Identifier: Apache-2.0
"""BEFT:  bias' = bias + b.

    beft_bias: (1, out), starts at 0

An embedding has no bias to add to: there b goes into each column, W' = W + b 1^T.
Source: BEFT (arXiv 2509.15974).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType

_V_PROJ = (
    "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3"
)


@dataclass
class BeftConfig(AdapterConfig):
    """PEFT's BeftConfig. init_weights: b starts at 0, else at random."""

    init_weights: bool = True

    without = ("exclude_modules", "layers_to_transform", "layers_pattern")
    default_targets = {  # noqa: RUF012
        **{key: ["v_proj"] for key in _V_PROJ.split()}, "t5": ["v"], "mt5": ["v"],
        "bert": ["value"], "roberta": ["value"], "deberta-v2": ["value_proj"],
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BEFT  # type: ignore[attr-defined]


class Beft(Adapter):
    name, prefix, Config = "beft", "beft_", BeftConfig

    def build(self, base: Base, shared: Any) -> None:
        b = nn.Parameter(torch.randn(1, base.shape[0]))
        self.identity_at_init = self.config.init_weights  # type: ignore[misc]
        if self.config.init_weights:
            nn.init.zeros_(b)
        self.parts = {"beft_bias": b}
        self._indexed = base.indexed

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        b: Tensor = self["beft_bias"]
        if self._indexed:
            return w + b.t(), bias
        return w, b.flatten() if bias is None else bias + b.flatten()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        b: Tensor = self["beft_bias"]
        if base.indexed:
            # through the layer's own op: some word embeddings scale their output
            ones = torch.zeros_like(x), torch.ones(1, 1, dtype=y.dtype, device=y.device)
            return torch.addcmul(y, base.apply(*ones).to(y.dtype), b.flatten().to(y.dtype))
        return y + base.channels(b.flatten()).to(y.dtype)
