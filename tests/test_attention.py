# SPDX-License-Identifier: Apache-2.0
"""LoRA on nn.MultiheadAttention, beyond what the comparison with PEFT holds (tests/parity)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadapt
from fastadapt import LoraConfig
from fastadapt.attention import AdaptedAttention
from fastadapt.errors import FastAdaptWarning, UnsupportedError
from tests.parity import models

BOTH = ["mha", "encoder.self_attn"]


def adapted(**fields: Any) -> Any:
    options = {"target_modules": BOTH, "r": 2, "init_lora_weights": False, **fields}
    torch.manual_seed(1)
    return fastadapt.get_peft_model(models.make("attention"), LoraConfig(**options))


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    return models.run(model.eval(), "attention")


def plain(model: Any) -> Any:
    """The base with W' written into copies of its weights."""
    made = models.make("attention")
    for path in BOTH:
        layer, target = model.base_model.model.get_submodule(path), made.get_submodule(path)
        out = layer.base_layer.out_proj
        with torch.no_grad():
            target.in_proj_weight += layer.get_delta_weight("default")
            target.out_proj.weight += out.get_delta_weight("default")
    return made


def test_an_encoder_layer_does_not_pass_the_adapters_by() -> None:
    """In evaluation it reads the attention's weights itself, where PEFT's adapters have none."""
    model = adapted()
    got, base = outputs(model), outputs(models.make("attention"))
    torch.testing.assert_close(got, outputs(plain(model)), rtol=1e-5, atol=1e-6)
    assert (got - base).abs().max() > 1e-2
    torch.testing.assert_close(got, models.run(model.train(), "attention"), rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model), base, rtol=1e-5, atol=1e-6)


def test_the_start_is_pefts() -> None:
    peft = pytest.importorskip("peft")
    held = []
    for library in (peft, fastadapt):
        base = models.make("attention")
        torch.manual_seed(1)
        model = library.get_peft_model(base, library.LoraConfig(target_modules=[*BOTH, "head"]))
        held.append({k: p for k, p in model.named_parameters() if p.requires_grad})
    theirs, ours = held
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], p) for k, p in theirs.items())


def test_merging_keeps_the_outputs_and_unmerging_the_bits() -> None:
    model = adapted()
    before = {k: p.clone() for k, p in model.state_dict().items()}
    got = outputs(model)
    model.merge_adapter()
    with model.disable_adapter():
        base = outputs(models.make("attention"))
        torch.testing.assert_close(outputs(model), base, rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), got, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], p) for k, p in before.items())
    assert not [k for k, p in model.named_parameters() if p.requires_grad and "lora_" not in k]


def test_two_adapters_and_their_files(tmp_path: Path) -> None:
    model = adapted(bias="lora_only")
    model.add_adapter("other", LoraConfig(target_modules=BOTH, r=3, init_lora_weights=False))
    assert sum(isinstance(m, AdaptedAttention) for m in model.modules()) == 2
    want = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        want[name] = outputs(model)
    model.save_pretrained(tmp_path)
    again = fastadapt.PeftModel.from_pretrained(models.make("attention"), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    for name in want:
        again.set_adapter(name)
        assert torch.equal(outputs(again), want[name]), name
    state, base = again.unload().state_dict(), models.make("attention").state_dict()
    assert state.keys() == base.keys()


@pytest.mark.parametrize("how", ["svd", "cat"])
def test_a_combination_is_the_sum_of_both_updates(how: str) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=BOTH, r=2, init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", how, svd_rank=4)
    for path in (*BOTH, *(f"{path}.base_layer.out_proj" for path in BOTH)):
        layer = model.base_model.model.get_submodule(path)
        one, two, both = (layer.get_delta_weight(n) for n in ("default", "other", "sum"))
        torch.testing.assert_close(both, 0.5 * one + 2 * two, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="MultiheadAttention does not support use_dora"):
        adapted(use_dora=True)
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        adapted()(torch.randn(3, 5, 8), adapter_names=["default"] * 3)
    with pytest.warns(FastAdaptWarning, match="lora_dropout has no effect on MultiheadAttention"):
        adapted(lora_dropout=0.5)
    with pytest.warns(FastAdaptWarning, match="never calls: an adapter there has no effect"):
        adapted(target_modules=["out_proj"])
