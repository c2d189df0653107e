# SPDX-License-Identifier: Apache-2.0
"""One model twice, driven by the same steps: what the state machines of the lifecycle share."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny
from tests.budget import worst_error

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "bias": {"lora_bias": True},
    "wide": {"r": 5, "target_modules": ["q_proj", "o_proj"]},
    "elsewhere": {"r": 2, "target_modules": ["o_proj"]},
    "dropout": {"lora_dropout": 0.3},
    "saved": {"modules_to_save": ["lm_head"]},
    "pattern": {"rank_pattern": {"0.q_proj": 3}, "alpha_pattern": {"1.q_proj": 5}},
}
"""Of a LoraConfig, by name."""


def config(kind: str) -> dict[str, Any]:
    return {"r": 4, "target_modules": ["q_proj"], **OPTIONS[kind]}


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 5, 8, generator=generator).to(dtype)


def give_values(model: nn.Module, name: str) -> None:
    """Values of their own to every parameter of the adapter ``name``, that none is zero."""
    for path, parameter in model.named_parameters():
        if name not in path.split("."):
            continue
        draw = random.Random(path)
        noise = torch.tensor([draw.gauss(0, 1) for _ in range(parameter.numel())])
        noise = noise.view(parameter.shape).to(parameter.dtype)
        near = "magnitude" in path or "modules_to_save" in path
        with torch.no_grad():
            parameter.copy_(parameter * (1 + 0.1 * noise) if near else 0.3 * noise)


def outcome(action: Callable[[Any], Any], model: Any) -> tuple[Any, type[Exception] | None]:
    """(what it gives, None) or (None, what it raises); warnings are another test's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return action(model), None
        except Exception as error:
            return None, type(error)


def run(model: Any, call: Callable[[Any, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter that has one, under its name."""
    dropping = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    training = model.training
    dtype = next(p.dtype for n, p in model.named_parameters() if "layers.0.q_proj" in n)
    if dropping:
        model.eval()
    for parameter in model.parameters():
        parameter.grad = None
    y = call(model, inputs(dtype)) if call else model(inputs(dtype))
    if y.requires_grad:
        y.square().mean().backward()
    if dropping:
        model.train(training)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **grads}


def assert_close(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor], steps: int = 8
) -> None:
    """At most twice the error of ``theirs`` and ``steps`` roundings: tensors of 8 values are too
    few for one error to say how large another may be. steps: products on the way to a value."""
    assert sorted(ours) == sorted(theirs)
    exact = {k: exact[k] for k in ours}
    unit = max(torch.finfo(v.dtype).eps for v in ours.values())
    allowed = 2 * worst_error(theirs, exact) + steps * unit
    assert worst_error(ours, exact) <= allowed


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """State dicts equal to the bit, keys in one order."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert torch.equal(value, b[key]), key


def structure(model: nn.Module) -> list[Any]:
    """Of every module: its path, class, and the names of its attributes and of their entries."""
    return [
        (path, type(module), sorted(module.__dict__),
         sorted((k, *(e for e in v if isinstance(e, str))) for k, v in module.__dict__.items()
                if isinstance(v, dict)))
        for path, module in model.named_modules()
    ]  # fmt: skip


def base() -> nn.Module:
    return tiny.Plain()
