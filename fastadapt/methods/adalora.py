# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA:  W' = W + s B diag(E) A,  s = alpha / r0,  with ranks that a budget takes from layers.

    A: (r, in * kernel)  E: (r, 1)  B: (out, r), r0 the rank at the start (``init_r``)

The loss has w mean(||A A^T - I||, ||B^T B - I||) over all layers. After each backward, importances
|p dL/dp| are smoothed (mean and deviation); as the budget falls from init_r to target_r a layer, by
a cubic, the triplets (row of A, E, column of B) that matter least get E = 0. Files hold the rest.
Source: AdaLoRA (arXiv 2303.10512).
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import PeftType
from fastadapt.errors import ConfigError, FastAdaptWarning, LifecycleError
from fastadapt.methods import fields
from fastadapt.methods.lora import LoraConfig
from fastadapt.methods.pair import PairAdapter, drop_part
from fastadapt.targets import DEFAULT_TARGETS

_DIFFERENT: dict[str, list[str] | str] = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}


@dataclass
class AdaLoraConfig(LoraConfig):
    """PEFT's AdaLoraConfig, on top of LoraConfig's fields (``r`` is not used, init_r is).

    target_r, init_r: ranks a layer at the end (on average) and at the start; total_step: all steps
    of the run, needed; tinit, tfinal: steps before and after the budget falls; deltaT: steps
    between two cuts; beta1, beta2: of the smoothed mean and deviation; orth_reg_weight: w;
    rank_pattern: path + ".lora_E" -> which ranks are kept, written by ``update_and_allocate``.
    """

    rank_pattern: Any = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    default_targets: ClassVar = {**DEFAULT_TARGETS, **_DIFFERENT}

    def __post_init__(self) -> None:
        # LoRA's check is of ranks, these are masks
        kept, self.rank_pattern = self.rank_pattern, {}
        super().__post_init__()
        self.rank_pattern = kept or {}
        self.peft_type = PeftType.ADALORA  # type: ignore[attr-defined]
        if self.r != 8:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored. Set `init_r`, the rank "
                "at the start, instead.",
                FastAdaptWarning,
                stacklevel=4,
            )
        fields.count(self, "target_r", "init_r", "deltaT")
        for name in ("use_dora", "loftq_config", "lora_bias"):
            if getattr(self, name):
                shown = {"use_dora": "DoRA", "loftq_config": "LOFTQ"}.get(name, name)
                raise ConfigError(f"{name}: ADALORA does not support {shown}")
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError(
                "AdaLoRA does not work when `total_step` is None, supply a value > 0."
            )
        if not self.orth_reg_weight >= 0:
            raise ConfigError(
                "`orth_reg_weight` should be greater than or equal to 0, but the value passed is "
                f"{self.orth_reg_weight}"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 0 < beta < 1, got {getattr(self, name)!r}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease "
                "`tfinal`/`tinit` or increase `total_step`."
            )

    def at(self, path: str) -> AdaLoraConfig:
        made = copy.copy(self)
        kept = self.rank_pattern.get(f"{path}.lora_E")
        made.rank = self.init_r if kept is None else sum(kept)
        return made

    rank = -1
    """Here, on this layer: set by ``at``."""

    @property
    def scaling(self) -> float:
        return float(self.lora_alpha if self.lora_alpha > 0 else self.init_r)

    def budget(self, step: int, start: int, layers: int) -> tuple[int, bool]:
        """(ranks in all at this step, whether to cut now) from ``start`` ranks in ``layers``."""
        last, end = (self.total_step or 0) - self.tfinal, self.target_r * layers
        if step <= self.tinit:
            return start, False
        if step > last:
            return end, True
        left = 1 - (step - self.tinit) / (last - self.tinit)
        return int((start - end) * left**3 + end), step % self.deltaT == 0


class AdaLora(PairAdapter):
    name, prefix, Config, dropout = "adalora", "lora_", AdaLoraConfig, "lora_dropout"

    @classmethod
    def variant(cls, config: AdaLoraConfig) -> type[AdaLora]:
        config.check_plain()
        return cls

    @classmethod
    def check_beside(cls, config: AdaLoraConfig, others: dict[str, Any]) -> None:
        if sum(not c.inference_mode for c in (config, *others.values())) > 1:
            raise ConfigError(
                "AdaLoraModel supports only 1 trainable adapter. When using multiple adapters, set "
                "inference_mode to True for all adapters except the one you want to train."
            )

    def build(self, base: Base, shared: Any) -> None:
        config: AdaLoraConfig = self.config
        rank = config.init_r if config.rank < 0 else config.rank
        width = math.prod(base.shape[1:])
        a, e, b = torch.randn(rank, width), torch.randn(rank, 1), torch.randn(base.shape[0], rank)
        # PEFT draws the start value of its counter of ranks, too
        torch.randn(1)
        if config.init_lora_weights:
            e = torch.zeros_like(e)
            a, b = nn.init.normal_(a, std=0.02), nn.init.normal_(b, std=0.02)
        self.parts = {
            "lora_dropout": drop_part(config.lora_dropout),
            **{f"lora_{k}": nn.Parameter(t) for k, t in (("A", a), ("B", b), ("E", e))},
        }
        self.values = {
            "r": rank, "lora_alpha": config.lora_alpha, "scaling": config.scaling,
            "ranknum": float(config.init_r),
        }  # fmt: skip
        self.kept: Tensor | None = None
        self.scores: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def scale(self) -> float:  # type: ignore[override]
        return float(self["scaling"] / (self["ranknum"] + 1e-5))

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self["lora_A"] * self["lora_E"], self["lora_B"]

    def file_forms(self, part: str) -> dict[str, Any]:
        if self.kept is None or part == "lora_dropout":
            return {}
        rows, dim = self.kept.nonzero().flatten(), int(part == "lora_B")
        return {"": lambda t: t.index_select(dim, rows.to(t.device))}

    def from_file(self, part: str, forms: dict[str, Tensor]) -> Tensor:
        whole: Tensor = self[part].detach().clone()
        kept = torch.ones(whole.shape[int(part == "lora_B")]) if self.kept is None else self.kept
        rows = kept.nonzero().flatten().to(whole.device)
        return whole.index_copy_(int(part == "lora_B"), rows, forms[""].to(whole))

    @classmethod
    def penalty(cls, config: AdaLoraConfig, adapters: dict[str, AdaLora]) -> Tensor | None:
        norms = []
        for adapter in adapters.values():
            for p in (adapter["lora_A"], adapter["lora_B"].t()):
                eye = torch.eye(p.shape[0], dtype=p.dtype, device=p.device)
                norms.append(torch.linalg.matrix_norm(p @ p.t() - eye))
        device = norms[0].device
        return config.orth_reg_weight * torch.stack([n.to(device) for n in norms]).mean()

    @classmethod
    @torch.no_grad()
    def on_step(cls, config: AdaLoraConfig, adapters: dict[str, AdaLora], step: int) -> None:
        last = (config.total_step or 0) - config.tfinal
        if step > last:
            for adapter in adapters.values():
                adapter.mask(adapter.kept)
            return
        if step < last:
            for adapter in adapters.values():
                adapter.observe(config)
        start = sum(a["lora_A"].shape[0] for a in adapters.values())
        budget, now = config.budget(step, start, len(adapters))
        if (now or step == last) and budget < start:
            scores = {path: adapter.importance() for path, adapter in adapters.items()}
            least = torch.cat([s.cpu() for s in scores.values()]).kthvalue(start - budget)[0]
            for path, adapter in adapters.items():
                adapter.mask(scores[path] > least.to(scores[path].device))
                config.rank_pattern[f"{path}.lora_E"] = adapter.kept.tolist()  # type: ignore[union-attr]
        if step == last:
            for adapter in adapters.values():
                adapter.scores = {}

    def observe(self, config: AdaLoraConfig) -> None:
        """Smooth |p dL/dp| and its deviation."""
        for part in ("lora_A", "lora_B", "lora_E"):
            p = self[part]
            if p.grad is None:
                raise LifecycleError(
                    "update_and_allocate needs gradients: call it after loss.backward() and before "
                    "optimizer.zero_grad()"
                )
            now = (p * p.grad).abs()
            mean, deviation = self.scores.get(part) or (torch.zeros_like(p), torch.zeros_like(p))
            mean = config.beta1 * mean + (1 - config.beta1) * now
            deviation = config.beta2 * deviation + (1 - config.beta2) * (now - mean).abs()
            self.scores[part] = mean, deviation

    def importance(self) -> Tensor:
        """Of each triplet: (r,)."""
        if not self.scores:
            raise LifecycleError("update_and_allocate: no importances, was step 0 left out?")
        a, b, e = (self.scores[p][0] * self.scores[p][1] for p in ("lora_A", "lora_B", "lora_E"))
        return e.view(-1) + (a.mean(1) + b.mean(0))

    def mask(self, kept: Tensor | None) -> None:
        """Zero E of the triplets that are not kept."""
        self.kept = kept
        if kept is not None:
            self["lora_E"].masked_fill_(~kept.unsqueeze(1), 0.0)
