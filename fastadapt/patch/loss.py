# SPDX-License-Identifier: Apache-2.0
"""The loss of a causal language model on a CPU, without a float32 copy of its logits.

A step of 8 layers of SmolLM2-135M's shapes on 2 x 256 tokens spends a quarter of its time in the
loss of transformers: the logits widened, their log-softmax, its gradient and that narrowed again
are 100 MB each. The loss here reads the logits once each way (``ops.cross_entropy``); the value is
the same sum in float32. Anywhere else than on a CPU with its kernel it is the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.ops.cross_entropy import cross_entropy, cross_entropy_fwd
from fastadapt.ops.dispatch import forced

_NAME = "_loss_function"


def enter(model: nn.Module) -> None:
    """Give a transformers model whose loss is ``ForCausalLMLoss`` this one."""
    known = any(c.__module__ == "transformers.modeling_utils" for c in type(model).__mro__)
    if known and _NAME not in model.__dict__ and model.loss_function is _of_transformers():
        model.__dict__[_NAME] = causal_lm_loss


def leave(model: nn.Module) -> None:
    """Undo ``enter``."""
    if model.__dict__.get(_NAME) is causal_lm_loss:
        del model.__dict__[_NAME]


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ``ForCausalLMLoss``: the mean over the labels that count, or their sum over
    ``num_items_in_batch``."""
    x = logits.view(-1, vocab_size)
    # (compiled, the model's own loss is one graph with its logits)
    if (
        torch.compiler.is_compiling()
        or forced() == "reference"
        or cross_entropy_fwd.why_not("native", x, labels, ignore_index) is not None
    ):
        loss: Tensor = _of_transformers()(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
        return loss
    if shift_labels is None and labels is not None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels is None:
        raise ValueError("expected labels or shift_labels")
    targets = shift_labels.reshape(-1).to(x.device)
    total = cross_entropy(x.contiguous(), targets, ignore_index).sum()
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    return total / num_items_in_batch


def _of_transformers() -> Any:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss
