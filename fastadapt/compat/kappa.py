# SPDX-License-Identifier: Apache-2.0
"""KappaTune: adapt the best-conditioned weights; kappa = s_max / s_min of the singular values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import FrozenLayer

_EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """Names of a model's linear layers and of its fused experts, smallest condition number first.

    max_dim_size_to_analyze: larger weights are left out; moe_param_suffixes: names of parameters
    (experts, out, in), whose kappa is the mean of their experts'. One SVD a weight."""

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or _EXPERTS
        self.show_progress = show_progress

    def get_best_targets(
        self,
        top_p: float | None = None,
        num_modules: int | None = None,
        threshold: float | None = None,
    ) -> list[str]:
        """Linear layers, for ``target_modules``: so many, a share (at least one), or those of a
        kappa up to the threshold."""
        return _best(self._modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self,
        top_p: float | None = None,
        num_modules: int | None = None,
        threshold: float | None = None,
    ) -> list[str]:
        """Fused experts, for ``target_parameters``."""
        return _best(self._parameters, top_p, num_modules, threshold)

    @cached_property
    def _modules(self) -> dict[str, float]:
        linear = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        return self._kappas(linear, lambda m: FrozenLayer(m).read()[0], "linear layers")

    @cached_property
    def _parameters(self) -> dict[str, float]:
        experts = [(n, p) for n, p in self.model.named_parameters()
                   if n.endswith(self.moe_param_suffixes) and p.dim() == 3]  # fmt: skip
        return self._kappas(experts, lambda p: p, "experts")

    def _kappas(
        self, items: list[tuple[str, Any]], read: Callable[[Any], Tensor], what: str
    ) -> dict[str, float]:
        shown: Iterable[tuple[str, Any]] = items
        if self.show_progress and items:
            from tqdm import tqdm  # type: ignore[import-untyped]

            shown = tqdm(items, desc=f"Condition numbers of {what}")
        found = {}
        with torch.no_grad():
            for name, held in shown:
                w = read(held).float()
                if max(w.shape[-2:]) <= self.max_dim_size_to_analyze:
                    s = torch.linalg.svdvals(w)
                    found[name] = float((s[..., 0] / (s[..., -1] + 1e-8)).mean())
        return found


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """{"target_modules": the best share of the linear layers, "target_parameters": of the fused
    experts, None without any}, for a LoraConfig."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


def _best(
    kappas: dict[str, float],
    top_p: float | None,
    num_modules: int | None,
    threshold: float | None,
) -> list[str]:
    names = sorted(kappas, key=kappas.__getitem__)
    if num_modules is not None:
        return names[:num_modules]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [n for n in names if kappas[n] <= threshold]
