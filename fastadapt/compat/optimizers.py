# SPDX-License-Identifier: Apache-2.0
"""LoRA+: B learns faster than A (Hayou, Ghosh, Yu 2024, https://arxiv.org/abs/2402.12354)."""

from __future__ import annotations

from typing import Any

from torch import nn


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: Any, *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Any:
    """``optimizer_cls`` over four groups: A at lr, embeddings at ``loraplus_lr_embedding``
    (1e-6), B and vectors at lr * ratio, those of the last that are biases without decay.

    loraplus_weight_decay: of the others (0). Other arguments go to the optimiser."""
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: dict[str, list[nn.Parameter]] = {"a": [], "embedding": [], "b": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding_" in name:
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            plain = "bias" in name or "norm" in name.lower()
            groups["plain" if plain else "b"].append(parameter)
        else:
            groups["a"].append(parameter)
    fast = lr * loraplus_lr_ratio
    rows = [("a", decay, lr), ("embedding", decay, embedding_lr), ("b", decay, fast),
            ("plain", 0.0, fast)]  # fmt: skip
    settings = [{"params": groups[n], "weight_decay": wd, "lr": rate} for n, wd, rate in rows]
    made = optimizer_cls(settings, lr=lr, **kwargs)
    if optimizer_cls.__name__ in ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"):
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return made
