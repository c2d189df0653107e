# SPDX-License-Identifier: Apache-2.0
"""Every method against PEFT: start values, files both ways, training steps, merged weights.

The cases are the ``CASES`` of each ``cases_*.py`` next to this file: a readable id -> a dict of

    peft, ours  names of the config classes; kwargs: their fields, for both
    model       a kind of ``models.py``; "llama" when absent
    nf4         PEFT serves the method on NF4 too, so that we are held to it there
    scale       of the random values that the adapter gets; 0.3 when absent
    lr          of the three training steps; 0.1 when absent
    skip        check ("start", "to_ours", "to_peft", "steps", "merge") -> why it cannot be
    missing     why PEFT finds keys missing that it has from elsewhere in our file
    extra       names of parameters that PEFT has and that are plain numbers here
    near        start values need an SVD or the like: equal to rounding, not to the bit
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadapt
from tests.parity import models

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

DENSE, NF4 = 2e-5, 1e-4
"""The relative error of logits against PEFT's that issue 4 allows in fp32."""

CASES: dict[str, dict[str, Any]] = {}
for file in sorted(Path(__file__).parent.glob("cases_*.py")):
    CASES.update(import_module(f"tests.parity.{file.stem}").CASES)


def each(check: str) -> Any:
    """Parametrised over the cases that have this check."""
    names = [n for n, case in CASES.items() if check not in case.get("skip", {})]
    return pytest.mark.parametrize("name", names)


@each("start")
def test_start_is_the_same(name: str) -> None:
    """Names in order, shapes, dtypes, trainability, counts and values of a fresh adapter."""
    theirs, ours = both(name)
    assert trained_or_base(ours, name) == facts(theirs, name)
    extra = sum(p.numel() for k, p in theirs.named_parameters() if is_extra(k, name))
    trainable, total = theirs.get_nb_trainable_parameters()
    assert ours.get_nb_trainable_parameters() == (trainable, total - extra)
    want, got = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for key, tensor in want.items():
        if is_extra(key, name):
            continue
        if CASES[name].get("near"):
            assert error(got[key], tensor) <= DENSE, key
        else:
            assert torch.equal(got[key], tensor), key


@each("to_ours")
def test_their_file_loads_in_ours(name: str, tmp_path: Path) -> None:
    theirs = randomised(adapted(peft, name), name)
    theirs.save_pretrained(tmp_path)
    loaded = fastadapt.PeftModel.from_pretrained(models.make(kind(name)), str(tmp_path))
    assert error(logits(loaded, name), logits(theirs, name)) <= DENSE
    assert error(logits(loaded, name), plain(name)) > 100 * DENSE, "the adapter does nothing"


@each("to_peft")
def test_our_file_loads_in_peft(name: str, tmp_path: Path) -> None:
    ours = randomised(adapted(fastadapt, name), name)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        if "missing" not in CASES[name]:
            warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        loaded = peft.PeftModel.from_pretrained(models.make(kind(name)), str(tmp_path))
    assert error(logits(loaded, name), logits(ours, name)) <= DENSE


@each("steps")
def test_three_steps_end_the_same(name: str) -> None:
    theirs, ours = both(name)
    share(randomised(theirs, name), ours)
    for model in (theirs, ours):
        train(model, name)
    moved = [k for k, p in theirs.named_parameters() if p.requires_grad]
    want, got = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert moved == [k for k, p in ours.named_parameters() if p.requires_grad]
    for key in moved:
        assert error(got[key], want[key]) <= 10 * DENSE, key
    assert error(logits(ours, name), logits(theirs, name)) <= DENSE


@each("merge")
def test_merged_weights_are_the_same(name: str) -> None:
    theirs, ours = both(name)
    share(randomised(theirs, name), ours)
    before = logits(ours, name)
    want, got = theirs.merge_and_unload().state_dict(), ours.merge_and_unload()
    assert error(models.run(got.eval(), kind(name)), before) <= DENSE
    state = got.state_dict()
    assert state.keys() == want.keys()
    for key, tensor in want.items():
        assert state[key].dtype == tensor.dtype, key
        assert error(state[key], tensor) <= DENSE, key


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.get("nf4")])
def test_nf4_is_the_same(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    theirs, ours = both(name, "nf4-fp32")
    assert trained_or_base(ours, name) == facts(theirs, name)
    share(randomised(theirs, name), ours)
    assert error(logits(ours, name), logits(theirs, name)) <= NF4


def kind(name: str) -> str:
    return str(CASES[name].get("model", "llama"))


def adapted(library: Any, name: str, fmt: str = "fp32", **more: Any) -> Any:
    """A fresh model with the case's adapter, from one seed."""
    case = CASES[name]
    config = getattr(library, case["peft" if library is peft else "ours"])
    fields = {"task_type": models.TASKS.get(kind(name)), **case["kwargs"], **more}
    base = models.make(kind(name), fmt)
    torch.manual_seed(11)
    return library.get_peft_model(base, config(**fields))


def both(name: str, fmt: str = "fp32") -> tuple[Any, Any]:
    return adapted(peft, name, fmt), adapted(fastadapt, name, fmt)


def randomised(model: Any, name: str) -> Any:
    """Every trained parameter moves by noise of its own, from its name, so that none is zero."""
    scale = CASES[name].get("scale", 0.3)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(key.encode()) * 7919 % 2**31)
            noise = torch.randn(parameter.shape, generator=generator)
            width = parameter.shape[1] if parameter.dim() > 1 else 1
            parameter.data += (noise * scale / width**0.5).to(parameter.dtype)
    return model


def share(source: Any, target: Any) -> None:
    """The trained values of one model to another with the same names."""
    held = {k: p.detach().clone() for k, p in source.named_parameters() if p.requires_grad}
    places = dict(target.named_parameters())
    for key, tensor in held.items():
        places[key].data.copy_(tensor)


def train(model: Any, name: str) -> None:
    """Three SGD steps, in training mode."""
    torch.manual_seed(5)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=CASES[name].get("lr", 0.1))
    for step in range(3):
        loss = models.loss(model, kind(name), seed=step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    return models.run(model.eval(), kind(name))


@torch.no_grad()
def plain(name: str) -> Tensor:
    return models.run(models.make(kind(name)).eval(), kind(name))


def facts(model: Any, name: str) -> list[Any]:
    return [
        (k, tuple(p.shape), p.dtype, p.requires_grad)
        for k, p in model.named_parameters()
        if not is_extra(k, name)
    ]


def is_extra(key: str, name: str) -> bool:
    return bool(set(CASES[name].get("extra", ())) & set(key.split(".")))


def trained_or_base(model: Any, name: str) -> list[Any]:
    """Without the constant parts of adapters, which PEFT holds as buffers."""
    layers = [m for m in model.modules() if hasattr(m, "adapters")]
    constant = {n for layer in layers for a in layer.adapters.values() for n in a.constant}
    return [f for f in facts(model, name) if not constant & set(f[0].split("."))]


def error(got: Tensor, want: Tensor) -> float:
    """|| got - want || / || want ||."""
    wide = want.detach().double()
    distance = (got.detach().double() - wide).norm()
    return float(distance / wide.norm().clamp(min=1e-12))
