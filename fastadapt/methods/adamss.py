# SPDX-License-Identifier: Apache-2.0
"""AdaMSS:  W' = W + P (B_1 A_1; .. ; B_K A_K) V,  the rows of W clustered into K subspaces.

    V: (r, in * kernel [+ 1]), W's leading right singular vectors, of [W b] where the layer has a
    bias, which the last column then moves    A_i: (q_i, r)  B_i: (rows of cluster i, q_i)

PEFT runs two small products for each cluster. They are one pair here: the rows of all A_i V, and
the B_i in one (out, sum q_i) matrix with zeros where a row is of another cluster.
Source: AdaMSS (NeurIPS 2025, openreview.net/forum?id=8ZdWmpYxT0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, LifecycleError
from fastadapt.methods import fields
from fastadapt.methods.projection import leading
from fastadapt.targets import DEFAULT_TARGETS


@dataclass
class AdamssConfig(AdapterConfig):
    """PEFT's AdamssConfig.

    r: singular vectors in V; num_subspaces: K; subspace_rank: q; init_weights: "orthogonal" starts
    at the identity, None at random; use_dynamic_rank: q_i counts singular values above
    svd_threshold times the largest; random_seed: of the SVD. use_asa: prune clusters down to
    asa_target_subspaces of all layers between the steps init_warmup and final_warmup, every
    mask_interval steps, by importance smoothed with asa_importance_beta and asa_uncertainty_beta.
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: Any = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    without = ("exclude_modules",)
    default_targets = {**DEFAULT_TARGETS, "vit": ["query", "value"]}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAMSS  # type: ignore[attr-defined]
        fields.count(self, "r", "num_subspaces", "subspace_rank")
        if self.init_weights is False:
            self.init_weights = None
        if self.init_weights not in ("orthogonal", None):
            raise ConfigError(f"init_weights must be 'orthogonal' or None, got {self.init_weights}")
        if not self.use_asa:
            return
        fields.count(self, "mask_interval", "asa_target_subspaces",
                     needs="must be a positive integer when `use_asa=True`, got")  # fmt: skip
        if self.init_warmup >= self.final_warmup:
            raise ConfigError(
                "`init_warmup` must be smaller than `final_warmup` when `use_asa=True` so that ASA "
                "has a non-empty pruning ramp, got "
                f"init_warmup={self.init_warmup} and final_warmup={self.final_warmup}."
            )
        if not self.asa_schedule_exponent > 0:
            raise ConfigError(
                "`asa_schedule_exponent` must be a positive number when `use_asa=True`, got "
                f"{self.asa_schedule_exponent}."
            )

    def target(self, step: int, total: int) -> int:
        """How many clusters are left at this step, of ``total``."""
        left = 1 - (step - self.init_warmup) / (self.final_warmup - self.init_warmup)
        end = self.asa_target_subspaces
        return int(end + (total - end) * min(max(left, 0.0), 1.0) ** self.asa_schedule_exponent)


class Adamss(Adapter):
    name, prefix, Config = "adamss", "adamss_", AdamssConfig
    constant = ("adamss_newB", "_adamss_rows")

    def build(self, base: Base, shared: Any) -> None:
        config: AdamssConfig = self.config
        w, bias = base.read()
        flat = w.detach().flatten(1).float()
        if bias is not None:
            flat = torch.cat([flat, bias.detach().float().unsqueeze(1)], 1)
        # clusters have to be found before anything has a shape, also where parts have no memory
        with torch.device("cpu"):
            u, _, v = leading(flat, min(config.r, *flat.shape), config.random_seed)
            clusters = _clusters(u, config.num_subspaces)
            downs, ups = zip(*(_start(u[rows], config) for rows in clusters), strict=True)
        device = torch.empty(0).device
        self.parts = {
            "adamss_A": nn.ParameterList(nn.Parameter(t.to(device)) for t in downs),
            "adamss_B": nn.ParameterList(nn.Parameter(t.to(device)) for t in ups),
            "adamss_newB": nn.Parameter(v.contiguous().to(device), requires_grad=False),
            "_adamss_rows": nn.Parameter(torch.cat(clusters).to(device), requires_grad=False),
        }
        self.values = {"num_subspaces": len(clusters), "_adamss_bias": bias is not None}
        self.identity_at_init = config.init_weights == "orthogonal"  # type: ignore[misc]
        self.scores: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def file_key(self, part: str, leaf: str) -> str | None:
        return None if part == "_adamss_rows" else super().file_key(part, leaf)

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b, shift = self._pair(w.shape[0])
        delta = (b @ a).view(w.shape)
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return w.to(torch.promote_types(w.dtype, delta.dtype)) + delta, bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        a, b, shift = self._pair(base.shape[0])
        if base.groups > 1:
            y, delta = base(x), (b @ a).view(base.shape)
            y = y + base.apply(x.to(delta.dtype), delta).to(y.dtype)
        else:
            y = base.low_rank(x, a.view(-1, *base.shape[1:]), b, 1.0)
        return y if shift is None else y + base.channels(shift).to(y.dtype)

    def _pair(self, out: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The one pair, and what is added to the bias."""
        a, blocks = torch.cat(list(self["adamss_A"])) @ self["adamss_newB"], list(self["adamss_B"])
        b = torch.block_diag(*blocks)
        b = b.new_zeros(out, b.shape[1]).index_copy(0, self["_adamss_rows"], b)
        if not self["_adamss_bias"]:
            return a, b, None
        return a[:, :-1], b, b @ a[:, -1]

    @classmethod
    @torch.no_grad()
    def on_step(cls, config: AdamssConfig, adapters: dict[str, Adamss], step: int) -> None:
        """Adaptive subspace allocation: smooth importances, and at intervals freeze the least."""
        if not config.use_asa or not config.init_warmup <= step <= config.final_warmup:
            return
        for adapter in adapters.values():
            adapter.observe(config)
        if step % config.mask_interval:
            return
        target = config.target(step, sum(a["num_subspaces"] for a in adapters.values()))
        found = [
            (a, i, a.importance(i)) for a in adapters.values() for i in range(a["num_subspaces"])
            if ("adamss_A", i) in a.scores and ("adamss_B", i) in a.scores
        ]  # fmt: skip
        if found:
            scores = torch.stack([s.cpu() for _, _, s in found])
            least = -torch.inf
            if target < len(found):
                least = -torch.kthvalue(-scores, max(target, 1))[0].item()
            for (adapter, i, _), score in zip(found, scores.tolist(), strict=True):
                for part in ("adamss_A", "adamss_B"):
                    p = adapter[part][i]
                    p.requires_grad_(score > least)
                    p.grad = p.grad if score > least else None
        for adapter in adapters.values():
            adapter.scores = {}

    def observe(self, config: AdamssConfig) -> None:
        """Smooth |p dL/dp| and its deviation, of each cluster that trains."""
        for part in ("adamss_A", "adamss_B"):
            for i, p in enumerate(self[part]):
                if p.grad is None:
                    continue
                held = self.scores.get((part, i))
                mean, deviation = held or (torch.zeros_like(p), torch.zeros_like(p))
                now = (p * p.grad).abs()
                deviation = deviation * config.asa_uncertainty_beta + (now - mean).abs() * (
                    1 - config.asa_uncertainty_beta
                )
                mean = mean * config.asa_importance_beta + now * (1 - config.asa_importance_beta)
                self.scores[part, i] = mean, deviation

    def importance(self, i: int) -> Tensor:
        """Of cluster i."""
        if ("adamss_A", i) not in self.scores:
            raise LifecycleError("update_and_allocate: no importances, call it after backward")
        a, b = (self.scores[part, i] for part in ("adamss_A", "adamss_B"))
        return (a[0] * a[1]).mean() + (b[0] * b[1]).mean()


def _clusters(u: Tensor, count: int) -> list[Tensor]:
    """The rows of each cluster of the rows of u: ten steps of Lloyd's k-means from the points that
    scikit-learn draws for PEFT."""
    from numpy.random import RandomState

    points, count = u.cpu() - u.cpu().mean(0), min(count, u.shape[0])
    even = [1 / len(points)] * len(points)
    picked = RandomState(123456789).choice(len(points), count, replace=False, p=even)
    centres, labels, old = points[torch.from_numpy(picked)], None, None
    still = 1e-4 * points.var(0, correction=0).mean()
    for _ in range(10):
        labels = torch.cdist(points, centres).argmin(1)
        moved = _means(points, labels, centres)
        shift, centres = (moved - centres).square().sum(), moved
        if old is not None and torch.equal(labels, old):
            break
        old = labels
        if shift <= still:
            labels = torch.cdist(points, centres).argmin(1)
            break
    else:
        labels = torch.cdist(points, centres).argmin(1)
    kept = [torch.where(labels == i)[0] for i in range(count)]
    return [rows for rows in kept if len(rows)]


def _means(points: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """The mean of each cluster; one that is empty takes a point far from its own centre."""
    sums = torch.zeros_like(centres).index_add_(0, labels, points)
    sizes = torch.bincount(labels, minlength=len(centres)).to(sums.dtype)
    empty = (sizes == 0).nonzero().flatten()
    if len(empty):
        far = (points - centres[labels]).square().sum(1).topk(len(empty)).indices
        for at, point in zip(empty.tolist(), far.tolist(), strict=True):
            sums[at], sizes[at] = points[point], 1
            sums[labels[point]] -= points[point]
            sizes[labels[point]] -= 1
    return sums / sizes.unsqueeze(1)


def _start(rows: Tensor, config: AdamssConfig) -> tuple[Tensor, Tensor]:
    """A_i and B_i of the cluster with these rows of U: (rows, r)."""
    gram, q = rows @ rows.t(), min(len(rows), config.subspace_rank)
    if config.use_dynamic_rank:
        s = torch.svd_lowrank(gram, q=len(rows), niter=2)[1]
        q = max(1, min(int((s > config.svd_threshold * s[0]).sum()), q))
    u = torch.svd_lowrank(gram, q=q, niter=2)[0]
    a = torch.linalg.qr(rows.t() @ u[:, :q])[0].t().contiguous()
    if config.init_weights == "orthogonal":
        return a, torch.zeros(len(rows), q)
    return a, torch.randn(len(rows), q) * 0.01
