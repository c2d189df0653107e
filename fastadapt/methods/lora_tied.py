# SPDX-License-Identifier: Apache-2.0
"""LoRA on a module whose weight is the input embedding's:  W' = W + s (B A)^T, B A the embedding's.

The pair is the embedding's own parameters, each trained once by the gradients of both places. A
head has them transposed, ``lora_A.weight`` = B^T and ``lora_B.weight`` = A^T, which are views.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.errors import UnsupportedError
from fastadapt.methods.lora import Lora


class TiedLora(Lora):
    def __init__(self, config: Any, base: Base, source: Adapter) -> None:
        self.source = source
        if type(source) is not Lora:
            raise UnsupportedError(
                f"ensure_weight_tying: a {source.name} adapter of an embedding cannot be shared "
                "with a head; use plain LoRA"
            )
        super().__init__(config, base)

    def build(self, base: Base, shared: Any) -> None:
        super().build(base, shared)
        own, other = self._prefix, "lora_embedding_"
        for part, theirs in (("A", "B"), ("B", "A")):
            if base.indexed:
                self.parts[own + part] = self.source.parts[other + part]
            else:
                self.parts[own + part] = Transposed(self.source, other + theirs)


class Transposed(nn.Module):
    """A linear map whose weight is a part of another adapter, transposed. It has no parameter, and
    state dicts have its weight, as PEFT's do."""

    bias = None

    def __init__(self, source: Adapter, part: str) -> None:
        super().__init__()
        self._source, self._part = source, part

    @property
    def weight(self) -> Tensor:
        held: Tensor = self._source[self._part]
        return held.t()

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        held = state_dict.get(f"{prefix}weight")
        if held is not None:
            with torch.no_grad():
                self.weight.copy_(held)
