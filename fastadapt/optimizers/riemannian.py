# SPDX-License-Identifier: Apache-2.0
"""Riemannian preconditioning of LoRA's gradients.

    dA <- (B^T B + reg I)^-1 dA        dB <- dB (A A^T + reg I)^-1

in float32 at least, before each step of any optimiser. Source: arXiv 2402.02347.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastadapt.errors import ConfigError


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimiser of a subclass of ``optimizer_cls`` that first preconditions the gradients of
    each trained pair of matrices A: (r, in), B: (out, r); other parameters go as they are.

    reg: the damping; kwargs go to ``optimizer_cls``. Raises ConfigError for an optimiser whose
    step needs a closure and for a model without such pairs."""
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(
            f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}."
        )
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{optimizer_cls.__name__} requires a closure and evaluates the loss in step(): its "
            "line search would see other gradients each time. Use one whose closure is optional"
        )
    pairs = _pairs(model)
    if not pairs:
        raise ConfigError(
            "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs "
            "on the model"
        )
    own: Any = type(
        f"Riemannian{optimizer_cls.__name__}", (_Preconditioned, optimizer_cls), {"pairs": pairs}
    )
    made: Optimizer = own([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)
    made.__dict__["reg"] = reg
    return made


class _Preconditioned:
    """Mixed in front of an optimiser."""

    pairs: list[tuple[nn.Parameter, nn.Parameter]]
    reg: float

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise ConfigError(
                "The Riemannian-preconditioned optimizer does not support closures: they would "
                "replace the preconditioned gradients before they are used"
            )
        for a, b in self.pairs:
            wide = torch.promote_types(a.dtype, torch.float32)
            wa, wb = a.to(wide), b.to(wide)
            if a.grad is not None:
                a.grad.copy_(_inverse(wb.t() @ wb, self.reg) @ a.grad.to(wide))
            if b.grad is not None:
                b.grad.copy_(b.grad.to(wide) @ _inverse(wa @ wa.t(), self.reg))
        return super().step()  # type: ignore[misc]


def _inverse(gram: Tensor, reg: float) -> Tensor:
    eye = torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype)
    inverse: Tensor = torch.linalg.pinv(gram + reg * eye)
    return inverse


def _pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    named = dict(model.named_parameters())
    found = [
        (a, named[name.replace(".lora_A.", ".lora_B.")])
        for name, a in named.items()
        if ".lora_A." in name and name.replace(".lora_A.", ".lora_B.") in named
    ]
    return [
        (a, b) for a, b in found
        if a.ndim == b.ndim == 2 and a.requires_grad and b.requires_grad
    ]  # fmt: skip
