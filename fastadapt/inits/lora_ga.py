# SPDX-License-Identifier: Apache-2.0
"""LoRA-GA: the pair starts along the gradient of W, so that its first step is the one that full
fine-tuning would take; the base keeps W - s b a.

    dL/dW = U S V^T     ArB2r: a = V_[0:r]^T,  b = U_[r:2r] S_[r:2r], times a scale

``preprocess_loraga`` runs the training step that gives the gradients. Without it (a saved adapter
is loaded, whose values replace the start anyway) the start is the default one.
Source: LoRA-GA (arXiv 2407.05000).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import targets
from fastadapt.base import Base
from fastadapt.errors import ConfigError, TargetError, UnsupportedError
from fastadapt.inits.init import FromWeight, Standard

NOTE = "_peft_loraga_grad"
"""The attribute of a layer that holds the gradient of its weight, as the layer stores it."""

_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class LoraGAConfig:
    """direction: which singular vectors go where; scale: how b is scaled; stable_gamma: of
    "stable", b times out^1/4 / gamma^1/2."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        for name, allowed in (("direction", _DIRECTIONS), ("scale", _SCALES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")


class LoraGA(FromWeight):
    def fill(self, a: Tensor, b: Tensor, base: Base, config: Any) -> None:
        self.changes_base = base.note(NOTE) is not None
        if not self.changes_base:
            Standard().fill(a, b, base, config)
            return
        if config.lora_ga_config is None:
            raise ConfigError("lora_ga_config must be provided when init_lora_weights='lora_ga'")
        super().fill(a, b, base, config)

    def pair(self, w: Tensor, base: Base, config: Any) -> tuple[Tensor, Tensor]:
        options = config.lora_ga_config
        r, scale = config.r, config.scaling
        grad = base.orient(base.note(NOTE)).float().flatten(1)
        u, s, v = torch.svd_lowrank(grad, q=min(4 * r, min(grad.shape)), niter=4)
        if s.shape[0] < 2 * r:
            raise UnsupportedError(
                f"init_lora_weights='lora_ga' needs 2 r <= min(out, in) = {min(grad.shape)}, got "
                f"r = {r}"
            )
        left, right = {
            "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
            "A2rBr": (slice(r, 2 * r), slice(0, r)),
            "ArB2r": (slice(0, r), slice(r, 2 * r)),
            "random": (None, None),
        }[options.direction]
        places: Any = torch.randperm(2 * r)[:r] if left is None else None
        rows = v.t()[left if places is None else places]
        kept = s[right if places is None else places]
        columns = u[:, right if places is None else places] * kept
        if options.scale == "stable":
            columns = columns * (w.shape[0] ** 0.25 / options.stable_gamma**0.5)
        elif options.scale == "weight_svd" and kept[0] > 0:
            columns = columns * (torch.svd_lowrank(w, q=r, niter=4)[1][0] / kept[0])
        elif options.scale == "gd_scale":
            rows, columns = rows / scale, columns / scale
        return rows, columns

    def started(self, base: Base) -> None:
        base.note(NOTE, forget=True)


@torch.no_grad()
def preprocess_loraga(
    model: nn.Module,
    lora_config: Any,
    train_step: Callable[[], None],
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Leave on each targeted linear layer the mean gradient of its weight over the backward passes
    that ``train_step()`` runs. cache_file: read when it is there, else written.

    Raises ConfigError without ``lora_ga_config``, UnsupportedError for a quantised layer,
    TargetError when no linear layer is targeted."""
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "If you want to use LoRA-GA, pass a LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)"
        )
    if lora_config.target_modules is None:
        wanted = targets.default_targets(model)
        lora_config.target_modules = wanted if isinstance(wanted, str) else set(wanted)
    chosen = set(targets.select(lora_config, [p for p, _ in targets.walk(model)]))
    found: list[tuple[str, Any]] = [(p, m) for p, m in targets.walk(model) if p in chosen]
    layers = {
        p: m for p, m in found
        if isinstance(getattr(m, "weight", None), Tensor) and m.weight.dim() == 2
        and not isinstance(m, nn.Embedding)
    }  # fmt: skip
    if not layers:
        raise TargetError("No supported layers found for LoRA-GA initialization: target a linear")
    for path, layer in layers.items():
        if not layer.weight.is_floating_point() or hasattr(layer.weight, "quant_state"):
            raise UnsupportedError(
                f"LoRA-GA does not support quantized models: {path} has no gradient of its weight"
            )
    if cache_file is not None and os.path.exists(cache_file) and os.path.getsize(cache_file):
        held = torch.load(cache_file, weights_only=True, map_location="cpu")
        for path, layer in layers.items():
            setattr(layer, NOTE, held[f"{path}.{NOTE}"].to(layer.weight.device))
        return
    _estimate(model, layers, train_step)
    if cache_file is not None:
        os.makedirs(os.path.dirname(os.path.abspath(cache_file)), exist_ok=True)
        torch.save({f"{p}.{NOTE}": getattr(m, NOTE) for p, m in layers.items()}, cache_file)


def _estimate(model: nn.Module, layers: dict[str, Any], train_step: Callable[[], None]) -> None:
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    training = model.training
    counts = dict.fromkeys(layers, 0)

    def counted(path: str) -> Any:
        def hook(*_: Any) -> None:
            counts[path] += 1

        return hook

    hooks = [m.register_full_backward_hook(counted(p)) for p, m in layers.items()]
    try:
        model.train()
        model.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        with torch.enable_grad():
            train_step()
        unseen = [p for p, m in layers.items() if m.weight.grad is None]
        if unseen:
            raise ConfigError(
                f"preprocess_loraga: train_step() gave {unseen[:3]} no gradient; "
                "run forward and backward in it"
            )
        for path, layer in layers.items():
            # a layer whose inputs have no gradient does not always run its hook: one pass then
            setattr(layer, NOTE, layer.weight.grad.detach() / max(counts[path], 1))
    finally:
        for handle in hooks:
            handle.remove()
        for layer in layers.values():
            layer.weight.grad = None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        model.train(training)
