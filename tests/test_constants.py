# SPDX-License-Identifier: Apache-2.0
"""Constants of adapters: buffers that layers and adapters share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastadapt
from fastadapt.constants import BufferDict
from tests import tiny

CONFIGS = {
    "vera": fastadapt.VeraConfig, "randlora": fastadapt.RandLoraConfig,
    "pvera": fastadapt.PveraConfig,
}  # fmt: skip
shared_methods = pytest.mark.parametrize("method", CONFIGS)


def adapted(method: str, **fields: Any) -> Any:
    config = CONFIGS[method](r=8, target_modules=["q_proj", "o_proj"], **fields)
    return fastadapt.get_peft_model(tiny.model(), config)


def constants(model: Any, name: str = "default") -> list[torch.Tensor]:
    return [m[name] for m in model.modules() if isinstance(m, BufferDict) and name in m]


@shared_methods
def test_no_parameter_stands_for_a_constant(method: str) -> None:
    model = adapted(method)
    assert constants(model)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert not [n for n in frozen if f"{method}_" in n]


@shared_methods
@pytest.mark.parametrize("change", ["to", "deepcopy"])
def test_layers_share_a_constant_still(method: str, change: str) -> None:
    model = adapted(method)
    unique = len({id(t) for t in constants(model)})
    assert unique < len(constants(model))
    model = model.to(torch.float64) if change == "to" else copy.deepcopy(model)
    assert len({id(t) for t in constants(model)}) == unique


@shared_methods
def test_adapters_share_equal_constants_until_one_is_loaded(method: str, tmp_path: Any) -> None:
    model = adapted(method)
    for tensor in constants(model):
        tensor.add_(1.0)
    model.save_pretrained(tmp_path)
    model = adapted(method)
    before = [t.clone() for t in constants(model)]
    model.add_adapter("same", model.peft_config["default"])
    assert all(a is b for a, b in zip(constants(model), constants(model, "same"), strict=True))
    model.load_adapter(tmp_path, "other")
    pairs = list(zip(constants(model), constants(model, "other"), strict=True))
    assert not any(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(constants(model), before, strict=True))


@shared_methods
def test_adapters_have_one_seed_and_one_way_to_be_saved(method: str) -> None:
    model = adapted(method)
    for field in ({"projection_prng_key": 7}, {"save_projection": False}):
        with pytest.raises(fastadapt.ConfigError, match=r"must be (the same|saved) for all"):
            model.add_adapter("other", CONFIGS[method](r=8, target_modules=["q_proj"], **field))


def test_a_buffer_dict_is_a_dict_of_buffers() -> None:
    held = BufferDict({"a": torch.ones(2)}, persistent=True)
    held.update([("b", torch.zeros(3, dtype=torch.int32))])
    assert list(held) == ["a", "b"]
    assert set(held.state_dict()) == {"a", "b"}
    assert not list(held.parameters())
    assert held.double()["a"].dtype == torch.float64
    assert held["b"].dtype == torch.int32
    assert torch.equal(held.pop("b"), torch.zeros(3, dtype=torch.int32))
    held.clear()
    assert len(held) == 0
