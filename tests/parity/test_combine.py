# SPDX-License-Identifier: Apache-2.0
"""``add_weighted_adapter``: PEFT's results where PEFT is right, else the sum of the updates."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fastadapt
from fastadapt.combine import TYPES
from fastadapt.errors import FastAdaptError, UnsupportedError

EXACT = ("svd", "cat")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.conv = nn.Conv1d(12, 14, 3, padding=1)
        self.linear = nn.Linear(14, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.linear(torch.tanh(h))


def pair(config: dict[str, Any], other: dict[str, Any], *, library: Any = fastadapt) -> Any:
    """A model with two adapters, "a" and "b", away from their start."""
    torch.manual_seed(0)
    model = library.get_peft_model(Net(), library.LoraConfig(**config), adapter_name="a")
    model.add_adapter("b", library.LoraConfig(**other))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def output(model: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    model.set_adapter(name)
    with torch.no_grad():
        return model(x)


CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["linear", "embedding"]}


@pytest.mark.parity
@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.2, -0.5)], ids=["positive", "negative"])
@pytest.mark.parametrize("how", [t for t in TYPES if t != "svd"])
def test_is_what_peft_makes(how: str, weights: tuple[float, float]) -> None:
    x = torch.arange(10).view(2, 5)
    found = []
    for library in (fastadapt, peft):
        model = pair(CONFIG, CONFIG, library=library)
        torch.manual_seed(3)  # the draws of pruning and of the new pair
        options = {} if how in ("cat", "linear") else {"density": 0.5}
        model.add_weighted_adapter(["a", "b"], list(weights), "c", combination_type=how, **options)
        found.append(output(model, "c", x))
    ours, theirs = found
    assert (ours - theirs).norm() <= 2e-5 * theirs.norm()


@pytest.mark.parametrize("kind", ["plain", "rslora", "lora_bias", "dora", "ranks", "patterns"])
@pytest.mark.parametrize("how", EXACT)
def test_update_is_the_weighted_sum_of_the_updates(how: str, kind: str) -> None:
    first: dict[str, Any] = {**CONFIG, "target_modules": ["linear", "conv"]}
    second = copy.deepcopy(first)
    if kind == "ranks":
        second["r"] = 2
    if kind == "patterns":
        second["rank_pattern"], second["alpha_pattern"] = {"linear": 3}, {"conv": 2}
    option = {"rslora": "use_rslora", "lora_bias": "lora_bias", "dora": "use_dora"}.get(kind)
    if option:
        first[option] = second[option] = True
    if kind == "lora_bias":
        first["target_modules"] = second["target_modules"] = ["linear"]
    model = pair(first, second)
    if kind == "dora" and how == "cat":
        with pytest.raises(UnsupportedError, match="svd"):
            model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type=how)
        assert "c" not in model.peft_config
        return
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type=how, svd_rank=14)
    for path in first["target_modules"]:
        layer = model.base_model.model.get_submodule(path)
        deltas = {n: layer.get_delta_weight(n).detach() for n in "abc"}
        wanted = 0.7 * deltas["a"] - 0.4 * deltas["b"]
        assert (deltas["c"] - wanted).norm() <= 1e-5 * wanted.norm()
        if kind == "lora_bias":
            bias = {n: layer.scaling[n] * layer.lora_B[n].bias.detach() for n in "abc"}
            torch.testing.assert_close(bias["c"], 0.7 * bias["a"] - 0.4 * bias["b"])
        assert not any(p.requires_grad for p in layer.lora_A["c"].parameters())


def test_ia3_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    config = {"target_modules": ["linear"], "feedforward_modules": [], "init_ia3_weights": False}
    model = fastadapt.get_peft_model(Net(), fastadapt.IA3Config(**config), adapter_name="a")
    model.add_adapter("b", fastadapt.IA3Config(**config))
    model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "c")
    held = model.base_model.model.linear.ia3_l
    torch.testing.assert_close(held["c"], 0.25 * held["a"] + 0.75 * held["b"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adapters": ["a", "x"], "weights": [1, 1]}, "Adapter x does not exist"),
        ({"weights": [1]}, "expected 2 weights"),
        ({"combination_type": "blend"}, "Invalid combination_type"),
        ({"combination_type": "ties"}, "needs a density"),
        ({"combination_type": "linear", "r": 2}, "same r value"),
        ({"svd_rank": 0}, "svd_rank"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(options: dict[str, Any], match: str) -> None:
    model = pair(CONFIG, {**CONFIG, "r": options.pop("r", 4)})
    before = model.state_dict().keys()
    arguments = {"adapters": ["a", "b"], "weights": [1, 1], "adapter_name": "c", **options}
    with pytest.raises(FastAdaptError, match=match):
        model.add_weighted_adapter(**arguments)
    assert model.state_dict().keys() == before
    assert list(model.peft_config) == ["a", "b"]
