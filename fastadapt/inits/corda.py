# SPDX-License-Identifier: Apache-2.0
"""CorDA: singular values of W as the inputs see it, W C with C the covariance of the inputs.

    W C = U S V^T     b = U_r (S_r / s)^1/2     a = (S_r / s)^1/2 (V_r^T C^-1)     W_res = W - s b a

"ipm" takes the largest r for the new task, "kpm" the smallest and so keeps what the base knows.
``preprocess_corda`` runs the model over samples and leaves the factors on each layer.
Source: CorDA (arXiv 2406.05223).
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
from fastadapt.errors import ConfigError, TargetError
from fastadapt.inits.init import FromWeight

NOTE = "eigens"
"""The attribute of a layer that holds its ``CordaEigens``."""

_INVERSE_ERROR = 0.05
_DAMPING = 0.01


@dataclass
class CordaConfig:
    """cache_file, covariance_file: read when there, else written; corda_method: "ipm" or "kpm";
    verbose: a progress bar; use_float16_for_covariance: half the memory;
    prune_temporary_fields: accepted, nothing is left on the layers but their factors."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ConfigError(f"Invalid corda_method found: {self.corda_method}, expected ipm, kpm")


@dataclass
class CordaEigens:
    """S_WC: (r,)  U_WC: (out, r)  V_WC: (in, r)."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


class Corda(FromWeight):
    changes_base = True

    def pair(self, w: Tensor, base: Base, config: Any) -> tuple[Tensor, Tensor]:
        held = base.note(NOTE)
        if held is None:
            raise ConfigError(
                "`eigens` attribute not found for layer, please run `preprocess_corda` first."
            )
        shapes = tuple(held.U_WC.shape), tuple(held.V_WC.shape)
        wanted = (w.shape[0], config.r), (w.shape[1], config.r)
        if shapes != wanted:
            raise ConfigError(
                f"Matrix U size mismatch: expected U and V of {wanted}, got {shapes}: was "
                "preprocess_corda run with another model, rank or cache?"
            )
        u, s, v = (t.to(w) for t in (held.U_WC, held.S_WC, held.V_WC))
        if not all(t.isfinite().all() for t in (u, s, v)):
            raise ConfigError("preprocess_corda left factors that are not finite on a layer")
        root = (s / config.scaling).sqrt()
        return v.t() * root.unsqueeze(1), u * root

    def started(self, base: Base) -> None:
        base.note(NOTE, forget=True)


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Leave on each targeted linear layer the factors that CorDA starts from.

    run_model: runs the model over samples; not needed when a file of the config is there.
    hooked_model: watch this model's layers instead of ``model``'s.
    Raises ConfigError for a config without ``corda_config`` or inputs that are not finite,
    TargetError when no linear layer is targeted."""
    options = lora_config.corda_config
    if options is None:
        raise ConfigError("preprocess_corda: expected a LoraConfig with corda_config=CordaConfig()")
    layers = _targeted(model, lora_config)
    if _there(options.cache_file):
        held = torch.load(options.cache_file, weights_only=True, map_location="cpu")
        for path, layer in layers.items():
            values = {k: held[f"{path}.{NOTE}.{k}"] for k in ("S_WC", "U_WC", "V_WC")}
            layer.eigens = CordaEigens(**{k: v.to(layer.weight.device) for k, v in values.items()})
        return
    covariances = _covariances(model, layers, lora_config, run_model, hooked_model)
    for path, layer in _progress(layers, options.verbose):
        rank = lora_config.at(path).r
        w = layer.weight.float()
        w = w.t() if _turned(layer) else w
        layer.eigens = _factors(w, covariances[path].float(), rank, options.corda_method)
    if options.cache_file is not None:
        _write(options.cache_file, {
            f"{path}.{NOTE}.{k}": getattr(layer.eigens, k)
            for path, layer in layers.items() for k in ("S_WC", "U_WC", "V_WC")
        })  # fmt: skip


def _covariances(
    model: nn.Module,
    layers: dict[str, Any],
    config: Any,
    run_model: Callable[[], None] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    """The mean over calls of x^T x, x scaled to its largest value: path -> (in, in)."""
    options = config.corda_config
    if _there(options.covariance_file):
        held: dict[str, Tensor] = torch.load(
            options.covariance_file, weights_only=True, map_location="cpu"
        )
        return {p: held[p].to(layer.weight.device) for p, layer in layers.items()}
    if run_model is None:
        raise ConfigError(
            "run_model must be specified when covariance file and cache file aren't built."
        )
    watched = layers if hooked_model is None else _targeted(hooked_model, config)
    sums: dict[str, Any] = dict.fromkeys(watched, 0)
    counts = dict.fromkeys(watched, 0)

    def watch(path: str) -> Any:
        def hook(_: Any, inputs: Any, __: Any) -> None:
            x = inputs[0].detach()
            x = x.reshape(-1, x.shape[-1])
            x = x if options.use_float16_for_covariance else x.float()
            x = x / x.max().abs()
            product = x.t() @ x
            if not product.isfinite().all():
                raise ConfigError(f"Invalid value found in input of {path}: check the samples")
            sums[path] = sums[path] + product
            counts[path] += 1

        return hook

    handles = [m.register_forward_hook(watch(p)) for p, m in watched.items()]
    training = (hooked_model or model).training
    try:
        (hooked_model or model).eval()
        run_model()
    finally:
        (hooked_model or model).train(training)
        for handle in handles:
            handle.remove()
    unseen = [p for p in layers if not counts.get(p)]
    if unseen:
        raise ConfigError(f"preprocess_corda: run_model() never reached {unseen[:3]}")
    found = {p: sums[p] / counts[p] for p in layers}
    if options.covariance_file is not None:
        _write(options.covariance_file, found)
    return found


def _factors(w: Tensor, covariance: Tensor, r: int, method: str) -> CordaEigens:
    eye = torch.eye(covariance.shape[0], device=covariance.device)
    damping = _DAMPING
    while True:
        c = covariance + eye * covariance.diagonal().mean() * damping
        inverse = torch.linalg.inv(c)
        if torch.dist(c @ inverse, eye) < _INVERSE_ERROR:
            break
        damping *= 2
    u, s, vt = torch.linalg.svd(w @ c, full_matrices=False)
    v = (vt @ inverse).t()
    kept = slice(0, r) if method == "ipm" else slice(-r, None)
    return CordaEigens(s[kept].clone(), u[:, kept].clone(), v[:, kept].clone())


def _targeted(model: nn.Module, config: Any) -> dict[str, Any]:
    if config.target_modules is None:
        wanted = targets.default_targets(model)
        config.target_modules = wanted if isinstance(wanted, str) else set(wanted)
    chosen = set(targets.select(config, [p for p, _ in targets.walk(model)]))
    found = {
        p: m for p, m in targets.walk(model)
        if p in chosen and (isinstance(m, nn.Linear) or _turned(m))
    }  # fmt: skip
    if not found:
        raise TargetError("CorDA: no linear layer among the targets")
    return found


def _turned(layer: nn.Module) -> bool:
    """GPT-2's Conv1D, whose weight is (in, out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _there(path: str | None) -> bool:
    return path is not None and os.path.exists(path) and os.path.getsize(path) > 0


def _write(path: str, values: dict[str, Tensor]) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    torch.save(values, path)


def _progress(layers: dict[str, Any], show: bool) -> Any:
    if not show:
        return layers.items()
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(layers.items(), desc="Collecting eigens")
