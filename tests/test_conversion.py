# SPDX-License-Identifier: Apache-2.0
"""Adapters of other methods as LoRAs: at full rank the same map, below it the best of that rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadapt
from fastadapt import convert_to_lora, save_as_lora
from tests import tiny

TARGETS = {"target_modules": ["q_proj", "o_proj"]}
CONFIGS: dict[str, Any] = {
    "lora": lambda: fastadapt.LoraConfig(r=3, init_lora_weights=False, **TARGETS),
    "dora": lambda: fastadapt.LoraConfig(r=3, use_dora=True, init_lora_weights=False, **TARGETS),
    "loha": lambda: fastadapt.LoHaConfig(r=2, init_weights=False, **TARGETS),
    "lokr": lambda: fastadapt.LoKrConfig(r=2, init_weights=False, **TARGETS),
    "vera": lambda: fastadapt.VeraConfig(r=4, init_weights=False, **TARGETS),
    "miss": lambda: fastadapt.MissConfig(r=2, init_weights=False, **TARGETS),
    "fourierft": lambda: fastadapt.FourierFTConfig(n_frequency=5, init_weights=False, **TARGETS),
    "psoft": lambda: fastadapt.PsoftConfig(r=3, init_weights=False, **TARGETS),
}


def adapted(method: str) -> Any:
    torch.manual_seed(0)
    return fastadapt.get_peft_model(tiny.Plain(), CONFIGS[method]()).eval()


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))


def loaded(config: Any, tensors: dict[str, Tensor]) -> Any:
    model = fastadapt.get_peft_model(tiny.Plain(), config).eval()
    report = fastadapt.set_peft_model_state_dict(model, tensors)
    assert not report.missing_keys
    assert not report.unexpected_keys
    return model


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("rank", [8, 1.0], ids=["whole", "share"])
def test_at_full_rank_it_is_the_same_map(method: str, rank: float, tmp_path: Any) -> None:
    model = adapted(method)
    assert model.supports_lora_conversion()
    want = outputs(model)
    assert not torch.allclose(want, outputs(tiny.Plain()), atol=1e-4)
    made = loaded(*convert_to_lora(model, rank))
    torch.testing.assert_close(outputs(made), want)
    save_as_lora(tmp_path, model, rank)
    again = fastadapt.PeftModel.from_pretrained(tiny.Plain(), tmp_path)
    assert torch.equal(outputs(again), outputs(made))
    assert torch.equal(outputs(model), want)


def test_the_best_of_its_rank_and_the_least_rank_of_its_share() -> None:
    model = adapted("loha")
    for rank in (2, 0.7):
        config, tensors = convert_to_lora(model, rank)
        for path in model.targeted_module_names:
            layer = model.base_model.model.get_submodule(path)
            delta = layer.get_delta_weight("default").detach()
            s = torch.linalg.svdvals(delta)
            a, b = (tensors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
            left = (delta - b @ a).square().sum()
            torch.testing.assert_close(left, s[len(a) :].square().sum(), atol=1e-6, rtol=1e-4)
            if isinstance(rank, float):
                kept = s.square().cumsum(0) / s.square().sum()
                assert kept[len(a) - 1] >= rank > (kept[len(a) - 2] if len(a) > 1 else 0)
                assert config.rank_pattern[path] == config.alpha_pattern[path] == len(a)
            else:
                assert len(a) == config.r == config.lora_alpha == rank


def test_half_precision_and_trained_modules_are_kept() -> None:
    config = fastadapt.LoKrConfig(
        r=2, init_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    model = fastadapt.get_peft_model(
        tiny.Plain().to(torch.bfloat16), config, autocast_adapter_dtype=False
    )
    made, tensors = convert_to_lora(model, 2)
    assert made.modules_to_save == ["lm_head"]
    assert made.target_modules == {"q_proj"}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert "base_model.model.lm_head.weight" in tensors


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Conv2d(4, 4, 3)


@pytest.mark.parametrize(
    ("base", "config", "rank", "error", "text"),
    [
        (tiny.Plain, None, 2, TypeError, "Could not detect any layer"),
        (tiny.Plain, fastadapt.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), 2,
         TypeError, "do not support LoRA conversion"),
        (Conv, fastadapt.LoKrConfig(target_modules=["q_proj"]), 2, TypeError, "do not support"),
        (tiny.Plain, fastadapt.C3AConfig(block_size=4, bias="all", target_modules=["q_proj"]), 2,
         ValueError, "sets bias=all"),
        (tiny.Plain, fastadapt.LoraConfig(lora_bias=True, target_modules=["q_proj"],
                                          init_lora_weights=False), 2, ValueError, "biases"),
        (tiny.Plain, CONFIGS["lokr"](), 9, ValueError, r"rank 9 is larger than the weight shape"),
        (tiny.Plain, CONFIGS["lokr"](), 0, ValueError, "rank of 0"),
        (tiny.Plain, CONFIGS["lokr"](), 1.5, ValueError, "between 0 and 1 but got 1.5"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
def test_what_cannot_be_converted(
    base: Any, config: Any, rank: float, error: Any, text: str
) -> None:
    model = base() if config is None else fastadapt.get_peft_model(base(), config)
    with pytest.raises(error, match=text):
        convert_to_lora(model, rank)
