# SPDX-License-Identifier: Apache-2.0
"""Make a quantised model ready for training, as PEFT's function of the same name does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LEFT_ALONE = ("gptq", "aqlm", "eetq", "hqq", "torchao")
"""Methods whose dense parameters belong to the quantised form."""


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze the model, widen its half-precision norms, embeddings and head to float32, and turn
    gradient checkpointing on (with gradients for the inputs).

    auto_clear_cache: empty the accelerator's cache after widening."""
    quantised = getattr(model, "is_loaded_in_8bit", False) or getattr(
        model, "is_loaded_in_4bit", False
    )
    method = getattr(model, "quantization_method", None)
    kept = str(getattr(method, "value", method)) in _LEFT_ALONE
    for parameter in model.parameters():
        parameter.requires_grad = False
    if not kept:
        for parameter in model.parameters():
            half = parameter.dtype in (torch.float16, torch.bfloat16)
            if half and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if (quantised or kept) and use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            _enable_input_grads(model)
        model.gradient_checkpointing_enable(
            **({"gradient_checkpointing_kwargs": options} if options else {})
        )
    return model  # type: ignore[no-any-return]


def _enable_input_grads(model: Any) -> None:
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
        return

    def require(_: nn.Module, __: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(require)
