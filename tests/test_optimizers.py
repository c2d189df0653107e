# SPDX-License-Identifier: Apache-2.0
"""The optimisers that belong to LoRA, against their formulas and against PEFT's own steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fastadapt
from fastadapt.errors import ConfigError
from fastadapt.optimizers import LoraFAOptimizer
from tests import tiny


def adapted(library: Any = fastadapt, **fields: Any) -> Any:
    model = library.get_peft_model(
        tiny.Plain(), library.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **fields)
    )
    tiny.randomise(model)
    return model


def step(model: Any, optimizer: Any, times: int = 3) -> dict[str, torch.Tensor]:
    for i in range(times):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k: p.detach() for k, p in model.named_parameters() if "lora_" in k}


def test_loraplus_gives_b_its_ratio_and_embeddings_their_rate() -> None:
    model = fastadapt.get_peft_model(
        tiny.model(), fastadapt.LoraConfig(target_modules=["q_proj", "embed_tokens"], bias="all")
    )
    optimizer = fastadapt.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {
        (g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]}
        for g in optimizer.param_groups
    }
    assert all("lora_A" in n for n in groups[1e-3, 0.1])
    assert all("lora_embedding" in n for n in groups[1e-6, 0.1])
    assert all("lora_B" in n for n in groups[1e-3 * 16, 0.1])
    assert all(n.endswith("bias") for n in groups[1e-3 * 16, 0.0])
    held = sum(len(g) for g in groups.values())
    assert held == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="loraplus_lr_ratio"):
        fastadapt.create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_lorafa_projects_the_gradient_of_b(rslora: bool) -> None:
    """One step of Adam without its history moves by lr in the sign of the projected gradient."""
    model = adapted(use_rslora=rslora)
    optimizer = fastadapt.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    layer = model.base_model.model.layers[0]["q_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = b.detach().clone()
    model(torch.randn(5, 8)).square().mean().backward()
    assert a.grad is None
    scale = 8 / (math.sqrt(4) if rslora else 4)
    assert layer.scaling["default"] == scale
    wanted = b.grad @ torch.linalg.inv(a @ a.t()) / scale**2
    optimizer.step()
    moved = before - 1e-2 * wanted / (wanted.abs() + 1e-6 / math.sqrt(1 - 0.999))
    assert (b - moved).abs().max() <= 1e-5
    with pytest.raises(ConfigError, match="use_rslora"):
        fastadapt.create_lorafa_optimizer(model, 4, 8, 1e-2, use_rslora=not rslora)


def test_lorafa_state_holds_no_weights_of_the_model() -> None:
    model = adapted()
    optimizer = fastadapt.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    assert isinstance(optimizer, LoraFAOptimizer)
    step(model, optimizer, 1)
    state = optimizer.state_dict()
    assert not [v for g in state["param_groups"] for v in g.values() if isinstance(v, torch.Tensor)]
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in state["state"].values())


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_riemannian_steps_are_those_of_peft(base: type[torch.optim.Optimizer]) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_riemannian_optimizer

    theirs, ours = adapted(peft, lora_alpha=6), adapted(lora_alpha=6)
    want = step(theirs, create_riemannian_optimizer(theirs, base, lr=0.05, reg=0.1))
    got = step(ours, fastadapt.create_riemannian_optimizer(ours, base, lr=0.05, reg=0.1))
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        # the pseudo-inverse of a well damped 4 x 4 matrix: some roundings of float32
        assert (got[key] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), key


def test_riemannian_refuses_what_it_cannot_do() -> None:
    model = adapted()
    with pytest.raises(ConfigError, match="closure"):
        fastadapt.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=0.1)
    with pytest.raises(ConfigError, match="did not find"):
        fastadapt.create_riemannian_optimizer(tiny.Plain(), torch.optim.SGD, lr=0.1)
    optimizer = fastadapt.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: 0.0)
