# SPDX-License-Identifier: Apache-2.0
"""LoRA on parameters of modules, beyond what the comparison with PEFT holds (tests/parity)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadapt
from fastadapt import LoraConfig
from fastadapt.errors import ConfigError, TargetError, UnsupportedError
from fastadapt.parameter import AdaptedParameter
from tests.parity import models

BOTH = ["up", "down"]


def adapted(**fields: Any) -> Any:
    options = {"target_parameters": BOTH, "target_modules": [], "r": 2, "lora_alpha": 3, **fields}
    return fastadapt.get_peft_model(
        models.make("experts"), LoraConfig(init_lora_weights=False, **options)
    )


def outputs(model: Any) -> Tensor:
    return models.run(model, "experts").detach()


def stacks(model: Any) -> list[AdaptedParameter]:
    return [m for m in model.modules() if isinstance(m, AdaptedParameter)]


def test_delta_is_that_of_each_expert() -> None:
    model = adapted()
    for layer in stacks(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        got = layer.frozen.orient(layer.get_delta_weight("default"))
        for e in range(3):
            want = b[:, e::3] @ a[2 * e : 2 * e + 2] * 1.5
            torch.testing.assert_close(got[e], want, rtol=1e-5, atol=1e-6)


def test_two_active_are_their_merge_and_unmerging_is_exact() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(target_parameters=BOTH, target_modules=[], r=5,
                                          init_lora_weights=False))  # fmt: skip
    assert len(stacks(model)) == 4, "the second adapter uses the wrappers that are there"
    plain = [layer.get_param().clone() for layer in stacks(model)]
    one = outputs(model)
    model.base_model.set_adapter(["default", "other"])
    both = outputs(model)
    assert (both - one).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), both, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        want = outputs(models.make("experts"))
        torch.testing.assert_close(outputs(model), want, rtol=1e-5, atol=1e-6)
    for layer, before in zip(stacks(model), plain, strict=True):
        assert torch.equal(layer.get_param(), before)


def test_gradients_reach_the_pairs_and_nothing_else() -> None:
    model = adapted(target_modules=["post"], bias="lora_only")
    models.loss(model, "experts").backward()
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or name.endswith("post.base_layer.bias")
        assert parameter.requires_grad == (parameter.grad is not None) == trained, name


@pytest.mark.parametrize("order", [("default", "other"), ("other", "default")])
def test_files_load_in_any_order_and_beside_layers_inside(order: Any, tmp_path: Path) -> None:
    model = adapted(target_modules=["post"], modules_to_save=["head"])
    model.add_adapter("other", LoraConfig(target_parameters=BOTH, r=3, init_lora_weights=False,
                                          target_modules=["post"]))  # fmt: skip
    want = {}
    for name in order:
        model.set_adapter(name)
        want[name] = outputs(model)
    model.save_pretrained(tmp_path)
    where = {"default": tmp_path, "other": tmp_path / "other"}
    again = fastadapt.PeftModel.from_pretrained(
        models.make("experts"), where[order[0]], adapter_name=order[0]
    )
    again.load_adapter(where[order[1]], order[1])
    for name in order:
        again.set_adapter(name)
        assert torch.equal(outputs(again), want[name]), name
    plain, left = models.make("experts").state_dict(), again.unload().state_dict()
    assert plain.keys() == left.keys()
    assert all(torch.equal(left[k], v) for k, v in plain.items())


class Holder(nn.Module):
    """x: (rows, 3) -> (rows, 5), and what its parameter was in the last call."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter((30 * torch.randn(4, 5, 3)).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.w
        return x @ self.w.float().sum(0).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_module_sees_the_dtype_of_its_parameter(dtype: torch.dtype) -> None:
    """Under autocast too; an 8-bit sum stays finite."""
    base = nn.Sequential(Holder(dtype))
    config = LoraConfig(target_parameters=["0.w"], r=2, lora_alpha=600, init_lora_weights=False)
    model = fastadapt.get_peft_model(base, config)
    (layer,) = stacks(model)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3))
    seen = base[0].base_layer.seen
    assert seen.dtype == dtype
    exact = base[0].get_param().double() + layer.adapters["default"].delta().double()
    top = torch.finfo(dtype).max
    exact = exact.clamp(-top, top)
    unit = torch.finfo(dtype).eps
    assert ((seen.double() - exact).abs() <= 2 * unit * exact.abs() + 300 * unit).all()


def test_a_parametrised_parameter_keeps_its_parametrisation() -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    base = nn.Sequential(nn.Linear(3, 4))
    nn.utils.parametrize.register_parametrization(base[0], "weight", Twice())
    x = torch.randn(2, 3)
    before = base(x)
    config = LoraConfig(target_parameters=["0.weight"], r=2, init_lora_weights=False)
    model = fastadapt.get_peft_model(base, config)
    delta = base[0].adapters["default"].delta()
    torch.testing.assert_close(model(x), before + x @ delta.t(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="is parametrised"):
        model.merge_adapter()
    assert torch.equal(model.unload()(x), before)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"lora_dropout": 0.1}, ConfigError, "ParamWrapper does not work with lora_dropout"),
        ({"use_dora": True}, ConfigError, "ParamWrapper does not work with use_dora=True"),
        ({"velora_config": {}}, ConfigError, "does not work with LoRA variants"),
        ({"lora_bias": True}, ConfigError, "does not work with lora_bias=True"),
        ({"target_parameters": ["0.up", "post.weight"], "target_modules": ["post"]},
         UnsupportedError, "Trying to wrap an `nn.Parameter` of layer 'blocks.0.post'"),
        ({"target_parameters": ["nowhere"]}, TargetError, "also no `target_parameters` found"),
        ({"target_parameters": ["post.bias"]}, UnsupportedError, "1 dimensional Parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(fields: Any, error: Any, match: str) -> None:
    base = models.make("experts")
    options = {"target_parameters": BOTH, "target_modules": [], **fields}
    with pytest.raises(error, match=match):
        fastadapt.get_peft_model(base, LoraConfig(**options))
    assert not stacks(base)


def test_what_cannot_be_later_is_refused() -> None:
    model = adapted()
    with pytest.raises(UnsupportedError, match="does not support mixed adapter batches yet"):
        model(torch.randn(2, 10), adapter_names=["default", "__base__"])
    with pytest.raises(ConfigError, match="must target the same set of parameters"):
        model.add_adapter("other", LoraConfig(target_parameters=["up"]))
    with pytest.raises(UnsupportedError, match=r"does not support targeting nn\.Parameter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(UnsupportedError, match="init_lora_weights='pissa' on a stack of 3"):
        fastadapt.get_peft_model(
            models.make("experts"),
            LoraConfig(target_parameters=BOTH, target_modules=[], init_lora_weights="pissa"),
        )


def test_one_matrix_takes_any_start() -> None:
    model = models.make("experts")
    before = outputs(model)
    config = LoraConfig(target_parameters=["gate"], r=2, init_lora_weights="pissa")
    model = fastadapt.get_peft_model(model, config)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)
