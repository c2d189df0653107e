# SPDX-License-Identifier: Apache-2.0
"""y[t] = scale * W[:, x[t]], with W as (dim, vocabulary); the layer stores its transpose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.kinds.kind import Kind


class Embedding(Kind):
    name = "embedding"
    indexed = True

    @classmethod
    def claims(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.embedding_dim, self.layer.num_embeddings

    def orient(self, w: Tensor) -> Tensor:
        return w.t()

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        layer = self.layer
        # a smaller table has rows that stand for several tokens: none of them is the padding
        padding = layer.padding_idx if w.shape[1] == layer.num_embeddings else None
        rows = F.embedding(
            x, w.t(), padding_idx=padding, max_norm=layer.max_norm,
            norm_type=layer.norm_type, scale_grad_by_freq=layer.scale_grad_by_freq,
            sparse=layer.sparse,
        )  # fmt: skip
        # Gemma's word embeddings multiply by sqrt(dim) inside the layer
        scale = getattr(layer, "embed_scale", None)
        return rows if scale is None else rows * scale.to(rows.dtype)

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        return F.linear(h, w)

    def pair(self, r: int, bias: bool) -> tuple[nn.Parameter, nn.Parameter]:
        n, k = self.shape
        return nn.Parameter(torch.randn(r, k)), nn.Parameter(torch.randn(n, r))
