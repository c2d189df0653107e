# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of adapters' tensors: weighted sums, TIES, DARE, magnitude pruning, a truncated SVD.

Tensors in, tensors out; what they mean to a method is the method's business (``Adapter.combine``).
Sources: task arithmetic (arXiv 2212.04089), TIES (arXiv 2306.01708), DARE (arXiv 2311.03099).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastadapt.errors import ConfigError, FastAdaptWarning

SUMS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""What can be done to tensors of one shape."""
TYPES = ("svd", "cat", *SUMS, *(f"{how}_svd" for how in SUMS if how != "linear"))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How adapters become one.

    how: one of ``TYPES``; rank: of the result of an SVD (None: the largest of the sources);
    clamp: quantile at which the factors of an SVD are clamped; density: the share of entries that
    pruning keeps, in (0, 1]; majority: "total" or "frequency", how TIES elects a sign.
    """

    how: str
    rank: int | None = None
    clamp: float | None = None
    full_matrices: bool = True
    driver: str | None = None
    density: float | None = None
    majority: str = "total"

    def __post_init__(self) -> None:
        if self.how not in TYPES:
            raise ConfigError(
                f"Invalid combination_type: {self.how}; expected one of {', '.join(TYPES)}"
            )
        if self.majority not in ("total", "frequency"):
            raise ConfigError(
                f"majority_sign_method: expected 'total' or 'frequency', got {self.majority!r}"
            )
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"svd_rank: expected a positive integer, got {self.rank}")
        if self.sum in ("linear",) or self.how == "cat":
            return
        if self.density is None or not self.density > 0:
            raise ConfigError(
                f"combination_type={self.how!r} needs a density, the share of entries to keep, in "
                f"(0, 1]; got {self.density}"
            )

    @property
    def sum(self) -> str:
        """The sum before any SVD, one of ``SUMS`` ("cat" for a concatenation)."""
        return "linear" if self.how == "svd" else self.how.removesuffix("_svd")

    @property
    def svd(self) -> bool:
        """The sum is taken of whole deltas, and its best approximation of rank r is kept."""
        return self.how.endswith("svd")

    def total(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """tensors of one shape -> their weighted sum, pruned and elected as ``sum`` says."""
        kept = torch.stack([self._pruned(t) for t in tensors])
        factors = torch.tensor(weights, dtype=kept.dtype, device=kept.device)
        scaled = kept * factors.view(-1, *[1] * (kept.dim() - 1))
        if not self.sum.endswith("ties"):
            return scaled.sum(0)
        votes = kept if self.majority == "total" else kept.sign()
        elected = torch.where(votes.sum(0) >= 0, 1, -1)
        agrees = kept.sign() == elected
        return (scaled * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def factors(self, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """delta: (out, in) -> A (rank, in), B (out, rank) with B A its best approximation; rows
        and columns beyond min(out, in) are zero."""
        full = self.full_matrices and rank > min(delta.shape)
        u, s, vh = torch.linalg.svd(
            delta.float(), full_matrices=full, driver=self.driver if delta.is_cuda else None
        )
        a = delta.new_zeros(rank, delta.shape[1], dtype=torch.float32)
        b = delta.new_zeros(delta.shape[0], rank, dtype=torch.float32)
        count = min(rank, s.numel())
        a[:count], b[:, :count] = vh[:count], u[:, :count] * s[:count]
        if self.clamp is not None:
            limit = torch.quantile(torch.cat([a.flatten(), b.flatten()]), self.clamp)
            a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
        return a, b

    def _pruned(self, tensor: Tensor) -> Tensor:
        how, density = self.sum, self.density
        if how == "linear" or density is None:
            return tensor
        if density >= 1:
            warnings.warn(f"density {density}: nothing is pruned", FastAdaptWarning, stacklevel=4)
            return tensor
        if how.startswith("dare"):
            return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
        kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
        mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        return tensor * mask.index_fill_(0, kept, 1).view_as(tensor)
