# SPDX-License-Identifier: Apache-2.0
"""LoRA+: B learns faster than A by a ratio.

Source: LoRA+ (arXiv 2402.12354).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastadapt.errors import ConfigError

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """``optimizer_cls`` over the trainable parameters of ``model``, in four groups:

    A and the rest at ``lr``; pairs on embeddings at ``loraplus_lr_embedding``; B and vectors at
    ``lr * loraplus_lr_ratio``; of those, biases and norms without weight decay. ``kwargs`` go to
    the optimiser. Raises ConfigError for a rate or a ratio that is not positive."""
    for name, value in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio)):
        if not value > 0:
            raise ConfigError(f"{name}: expected a positive number, got {value!r}")
    normed = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    slow: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    fast_no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding_" in name:
            embedding.append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            kept = "bias" in name or id(parameter) in normed
            (fast_no_decay if kept else fast).append(parameter)
        else:
            slow.append(parameter)
    decay, high = loraplus_weight_decay, lr * loraplus_lr_ratio
    groups = [
        {"params": slow, "weight_decay": decay, "lr": lr},
        {"params": embedding, "weight_decay": decay, "lr": loraplus_lr_embedding},
        {"params": fast, "weight_decay": decay, "lr": high},
        {"params": fast_no_decay, "weight_decay": 0.0, "lr": high},
    ]
    made: Any = optimizer_cls
    optimizer: Optimizer = made(groups, lr=lr, **kwargs)
    if optimizer_cls.__name__ in _EIGHT_BIT:
        _keep_embeddings_wide(model)
    return optimizer


def _keep_embeddings_wide(model: nn.Module) -> None:
    """8-bit optimiser states are unstable on embeddings."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
