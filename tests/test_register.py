# SPDX-License-Identifier: Apache-2.0
"""``register_peft_method``: a method of one's own goes through the whole life of an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastadapt.utils import register_peft_method
from torch import Tensor, nn

import fastadapt
from fastadapt.adapter import Adapter
from fastadapt.config import AdapterConfig
from fastadapt.methods import OWN
from tests import tiny


@dataclass
class ShiftConfig(AdapterConfig):
    size: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "SHIFT"


class Shift(Adapter):
    """W' = W + c on the whole weight."""

    name, prefix, Config = "shift", "shift_", ShiftConfig

    def build(self, base: Any, shared: Any) -> None:
        self.identity_at_init = False  # type: ignore[misc]
        self.parts = {"shift_c": nn.Parameter(torch.full((1,), self.config.size))}

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + self["shift_c"].to(w), bias


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    OWN.clear()


def test_an_adapter_of_ones_own(tmp_path: Any) -> None:
    register_peft_method(name="shift", config_cls=ShiftConfig, model_cls=Shift)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    model = fastadapt.get_peft_model(tiny.Plain(), ShiftConfig(target_modules=["q_proj"], size=0.1))
    plain = tiny.Plain()
    with torch.no_grad():
        for block in plain.layers:
            block["q_proj"].weight.add_(0.1)
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = fastadapt.PeftModel.from_pretrained(tiny.Plain(), tmp_path)
    assert type(loaded.peft_config["default"]) is ShiftConfig
    assert torch.equal(loaded(x), model(x))
    assert torch.allclose(model.merge_and_unload()(x), plain(x), atol=1e-6)


def test_a_configuration_alone() -> None:
    register_peft_method(name="shift", config_cls=ShiftConfig, model_cls=None)
    assert type(fastadapt.get_peft_config({"peft_type": "SHIFT", "size": 2.0})) is ShiftConfig
    with pytest.raises(fastadapt.UnsupportedError, match="without an Adapter"):
        fastadapt.get_peft_model(tiny.Plain(), ShiftConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("name", "prefix", "error", "text"),
    [
        ("shift_", None, ValueError, "without '_' suffix"),
        ("Shift", None, ValueError, "lower case"),
        ("lora", None, KeyError, "already PEFT method"),
        ("prompt_tuning", None, KeyError, "already PEFT method"),
        ("shift", "lora_", KeyError, "already a prefix"),
        ("shift", "other_", ValueError, "Inconsistent prefixes"),
    ],
)
def test_names_that_cannot_be(name: str, prefix: str | None, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        register_peft_method(name=name, config_cls=ShiftConfig, model_cls=Shift, prefix=prefix)
    assert not OWN
