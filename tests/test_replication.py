# SPDX-License-Identifier: Apache-2.0
"""Replicated layers share the base's weights and have adapters of their own, as in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadapt
from fastadapt.errors import ConfigError, LifecycleError, UnsupportedError
from tests import tiny
from tests.parity import models

peft = pytest.importorskip("peft")

RANGES = [[0, 1], [0, 2], [1, 2]]
KINDS = {"llama": "down_proj", "bert": "query"}


def adapted(library: Any, kind: str, **more: Any) -> Any:
    fields = {"r": 4, "target_modules": [KINDS[kind]], "layer_replication": RANGES, **more}
    base = models.make(kind)
    torch.manual_seed(0)
    config = library.LoraConfig(
        init_lora_weights=False, task_type=models.TASKS[kind], **fields,
    )  # fmt: skip
    return library.get_peft_model(base, config)


@torch.no_grad()
def logits(model: Any, kind: str) -> Tensor:
    return models.run(model.eval(), kind)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_outputs_files_and_merge(kind: str, tmp_path: Path) -> None:
    theirs, ours = adapted(peft, kind), adapted(fastadapt, kind)
    want, got = logits(theirs, kind), logits(ours, kind)
    assert error(got, want) < 2e-5
    assert list(dict(ours.named_parameters())) == list(dict(theirs.named_parameters()))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    there = fastadapt.PeftModel.from_pretrained(models.make(kind), tmp_path / "theirs")
    here = peft.PeftModel.from_pretrained(models.make(kind), tmp_path / "ours")
    assert error(logits(there, kind), want) < 2e-5
    assert error(logits(here, kind), want) < 2e-5
    # PEFT adds every copy's update to the one weight that they share
    assert error(logits(ours.merge_and_unload(), kind), want) < 2e-5


def test_weights_are_shared_and_a_second_adapter_stands_on_the_same_layers() -> None:
    model = adapted(fastadapt, "llama")
    layers = model.base_model.model.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert model.config.num_hidden_layers == 4
    shared = [layer.mlp.down_proj.base_layer.weight for layer in layers]
    assert shared[0] is shared[1]
    assert shared[2] is shared[3]
    assert shared[1] is not shared[2]
    config = fastadapt.LoraConfig(target_modules=["q_proj"], layer_replication=RANGES)
    model.add_adapter("other", config)
    assert len(model.base_model.model.model.layers) == 4
    with pytest.raises(LifecycleError, match="layer_replication: the model has adapters"):
        model.add_adapter("third", fastadapt.LoraConfig(target_modules=["q_proj"],
                                                        layer_replication=[[0, 1]]))  # fmt: skip


def test_refusals_leave_the_model_alone() -> None:
    model = tiny.model("llama")
    before = tiny.snapshot(model)
    for fields, match in (
        ({"layer_replication": [[0, 9]]}, "within the 2 layers"),
        ({"layer_replication": RANGES, "target_modules": ["nowhere"]}, "not found"),
    ):
        with pytest.raises(ValueError, match=match):
            fastadapt.get_peft_model(model, fastadapt.LoraConfig(**fields))
        tiny.assert_same(model, before)
    with pytest.raises(ConfigError, match="expected ranges"):
        fastadapt.get_peft_model(model, fastadapt.LoraConfig(layer_replication=[[1, 1]]))
    with pytest.raises(UnsupportedError, match="Could not locate the layers attribute"):
        fastadapt.get_peft_model(
            models.make("conv"),
            fastadapt.LoraConfig(target_modules=["head"], layer_replication=RANGES),
        )


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).double().norm() / want.double().norm())
