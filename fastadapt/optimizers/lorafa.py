# SPDX-License-Identifier: Apache-2.0
"""LoRA-FA: A stays as it is, and B follows AdamW on the gradient that comes nearest to W's own.

    dB <- (1 / s^2) dB (A A^T)^+

Other trained parameters follow AdamW. Source: LoRA-FA (arXiv 2308.03303).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastadapt.errors import ConfigError

_DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW, but for each B in ``pairs`` (B -> its A and s) on the projected gradient.

    Raises ConfigError for a number out of its range."""

    pairs: dict[Tensor, tuple[Tensor, float]]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0.0:
            raise ConfigError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ConfigError(f"Invalid beta parameter: {beta} - should be in [0.0, 1.0)")
        if eps < 0.0:
            raise ConfigError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.pairs = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    pair = self.pairs.get(p)
                    self._update(p, p.grad if pair is None else _projected(p.grad, *pair), group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def _projected(grad: Tensor, a: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    gram = a.to(wide) @ a.to(wide).t()
    gram += _DAMPING * torch.eye(gram.shape[0], device=gram.device, dtype=wide)
    projected: Tensor = (grad.to(wide) @ torch.linalg.pinv(gram)) / scale**2
    return projected.to(grad.dtype)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """LoRA-FA over ``model``, whose A are frozen by this call.

    s is each layer's own scaling; ``r``, ``lora_alpha`` and ``use_rslora`` are PEFT's arguments,
    used for a pair whose layer has none. Raises ConfigError when ``use_rslora`` contradicts the
    model's config."""
    active: Any = getattr(model, "active_adapters", [])
    names = active() if callable(active) else active
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    used = {n: bool(getattr(configs[n], "use_rslora", False)) for n in names if n in configs}
    if use_rslora is not None:
        other = [n for n, flag in used.items() if flag != use_rslora]
        if other:
            raise ConfigError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but adapters "
                f"{other} have it set differently; it is read from their configs, leave it out"
            )
        warnings.warn(
            "`use_rslora` in create_lorafa_optimizer is deprecated: it is read from the LoraConfig",
            FutureWarning,
            stacklevel=2,
        )
    rooted = all(used.values()) and bool(used) if use_rslora is None else use_rslora
    default = lora_alpha / (math.sqrt(r) if rooted else r)
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    params: list[nn.Parameter] = []
    pairs: dict[Tensor, tuple[Tensor, float]] = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        path, found, rest = name.rpartition(".lora_B.")
        a = named.get(f"{path}.lora_A.{rest}") if found and parameter.ndim == 2 else None
        adapter = rest.split(".")[0]
        scales = getattr(model.get_submodule(path), "scaling", {}) if a is not None else {}
        params.append(parameter)
        if a is not None:
            pairs[parameter] = a, float(scales.get(adapter, default))
    optimizer = LoraFAOptimizer(params, lr=lr, weight_decay=weight_decay)
    optimizer.pairs = pairs
    return optimizer
