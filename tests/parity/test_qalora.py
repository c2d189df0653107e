# SPDX-License-Identifier: Apache-2.0
"""QALoRA against PEFT's, which has it for GPTQ layers only: its variant, on a plain layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastadapt

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("group", [2, 3, 12])
def test_the_same_outputs_and_gradients(group: int) -> None:
    from peft.tuners.lora.variants import QALoraLinearVariant as Variant

    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(12, 7)), torch.randn(2, 5, 12)
    fields: dict[str, Any] = {"target_modules": ["0"], "r": 3, "lora_alpha": 5}
    config = peft.LoraConfig(**fields, qalora_group_size=group)
    theirs = peft.get_peft_model(nn.Sequential(base[0]), config).base_model.model[0]
    Variant.init(theirs, "default", config=config)
    own = fastadapt.LoraConfig(**fields, use_qalora=True, qalora_group_size=group)
    ours = fastadapt.get_peft_model(nn.Sequential(base[0]), own).base_model.model[0]
    for part in ("lora_A", "lora_B"):
        mine, other = (getattr(layer, part)["default"].weight for layer in (ours, theirs))
        assert mine.shape == other.shape
        with torch.no_grad():
            mine.copy_(other.normal_())
    want, got = Variant.forward(theirs, "default", x, theirs.base_layer(x)), ours(x)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    for y in (want, got):
        y.square().mean().backward()
    for part in ("lora_A", "lora_B"):
        mine, other = (getattr(layer, part)["default"].weight for layer in (ours, theirs))
        torch.testing.assert_close(mine.grad, other.grad, rtol=2e-5, atol=2e-5)
