# SPDX-License-Identifier: Apache-2.0
"""Files of Bone, which PEFT renamed to MiSS, load as what they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastadapt
from tests import tiny


@pytest.mark.parametrize("weights", [True, "bat"])
def test_bone_file_loads(tmp_path: Path, weights: bool | str) -> None:
    config = fastadapt.MissConfig(r=8, init_weights=weights, target_modules=["q_proj", "down_proj"])
    ours = fastadapt.get_peft_model(tiny.model(), config)
    for _, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    want = ours(**tiny.batch()).logits
    state = {
        k.replace("miss_block.default", "bone_block"): p.detach()
        for k, p in ours.named_parameters() if "miss_block" in k
    }  # fmt: skip
    assert state
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {
        "peft_type": "BONE", "r": 8, "init_weights": weights, "bias": "none",
        "target_modules": ["q_proj", "down_proj"], "inference_mode": True, "task_type": None,
        "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    loaded = fastadapt.PeftModel.from_pretrained(tiny.model(), str(tmp_path))
    torch.testing.assert_close(loaded(**tiny.batch()).logits, want, rtol=0, atol=0)
