# SPDX-License-Identifier: Apache-2.0
"""The life of adapters on a model: through both doors, and back out without a trace."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadapt
from fastadapt import testing
from fastadapt.errors import LifecycleError
from fastadapt.layer import AdaptedLayer
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

Door = Callable[..., Any]
DOORS = [
    pytest.param(fastadapt.patch, id="patch"),
    pytest.param(fastadapt.get_peft_model, id="get_peft_model"),
]
FORMATS = ["fp32", "nf4", "int8"]
both_doors = pytest.mark.parametrize("door", DOORS)


def config(**fields: Any) -> fastadapt.LoraConfig:
    return fastadapt.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **fields})


def adapted(door: Door, kind: str = "llama", fmt: str = "fp32", **fields: Any) -> Any:
    """A model in evaluation with one adapter that changes its outputs."""
    torch.manual_seed(1)
    model = door(tiny.model(kind, fmt), config(**fields))
    tiny.randomise(model)
    return model.eval()


def add(model: Any, name: str = "other", **fields: Any) -> None:
    model.add_adapter(name, config(**{"target_modules": ["q_proj", "o_proj"], **fields}))
    tiny.randomise(model)


def logits(model: Any, kind: str = "llama", **more: Any) -> Tensor:
    inputs = tiny.batch(kind)
    inputs.pop("labels")
    with torch.no_grad():
        return model(**inputs, **more).logits  # type: ignore[no-any-return]


def layers(model: Any) -> list[AdaptedLayer]:
    return [m for m in model.modules() if isinstance(m, AdaptedLayer)]


def trainable(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


# what comes back


def test_patch_is_in_place() -> None:
    model = tiny.model()
    plain = type(model)
    made = fastadapt.patch(model, config())
    assert made is model
    assert isinstance(model, plain)
    assert type(model) is not plain
    assert type(model).__name__ == plain.__name__
    assert type(model).forward is plain.forward


@both_doors
@pytest.mark.parametrize("fmt", FORMATS)
def test_an_adapter_starts_as_the_identity_and_trains_alone(door: Door, fmt: str) -> None:
    base = tiny.model(fmt=fmt).eval()
    before = logits(base)
    model = door(base, config())
    # an int8 layer quantises its input and is called as it is, so nothing may differ there either
    testing.check(logits(model.eval()), before, before.double())
    assert trainable(model) == {n for n, _ in tiny.adapter_parameters(model)}
    model.train()(**tiny.batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


@pytest.mark.parity
def test_everything_counts_as_pefts() -> None:
    """Every isinstance in the ecosystem holds."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = fastadapt.get_peft_model(tiny.model(), config(task_type="CAUSAL_LM"))
    assert isinstance(wrapped, peft.PeftModel)
    assert isinstance(wrapped, peft.PeftModelForCausalLM)
    assert isinstance(wrapped, fastadapt.PeftModelForCausalLM)
    assert isinstance(wrapped.peft_config["default"], peft.LoraConfig)
    assert isinstance(wrapped.peft_config["default"], fastadapt.LoraConfig)
    patched = fastadapt.patch(tiny.model(), config())
    assert not isinstance(patched, peft.PeftModel)
    for model in (wrapped, patched):
        assert layers(model)
        assert all(isinstance(layer, BaseTunerLayer) for layer in layers(model))


@pytest.mark.parity
@both_doors
def test_pefts_own_configs_are_taken(door: Door) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    theirs = door(tiny.model(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    ours = door(tiny.model(), config())
    want, got = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(want) == list(got)
    assert all(torch.equal(got[k], want[k]) for k in want)


# several adapters


@both_doors
def test_second_adapter_does_not_become_active(door: Door) -> None:
    model = adapted(door)
    before, one = logits(model), trainable(model)
    add(model)
    assert torch.equal(logits(model), before)
    assert trainable(model) == one
    model.set_adapter("other")
    assert trainable(model) == {n for n, _ in tiny.adapter_parameters(model) if ".other." in n}
    assert not torch.equal(logits(model), before)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    assert trainable(model) == one


@both_doors
def test_several_active_adapters_add_up(door: Door) -> None:
    """On a linear layer: y_base + d_1 + d_2."""
    model = adapted(door, target_modules=["lm_head"])
    add(model, target_modules=["lm_head"])
    parts = {}
    for names in ("default", "other"):
        model.set_adapter(names)
        parts[names] = logits(model).double()
    with model.disable_adapter():
        base = logits(model)
    set_all(model, ["default", "other"])
    exact = parts["default"] + parts["other"] - base
    plain = (parts["default"].float() + parts["other"].float()) - base
    testing.check(logits(model), plain, exact)
    assert trainable(model) == {n for n, _ in tiny.adapter_parameters(model)}


@both_doors
def test_a_name_is_taken_once(door: Door) -> None:
    model = adapted(door)
    before = tiny.snapshot(model)
    with pytest.raises(LifecycleError, match="already exists"):
        model.add_adapter("default", config())
    for name in ("a.b", "", "__base__", None, 3):
        with pytest.raises((LifecycleError, fastadapt.ConfigError)):
            model.add_adapter(name, config()) if name else model.add_adapter(config(), name="")
    tiny.assert_same(model, before)


@both_doors
@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter"])
def test_an_unknown_name_is_refused(door: Door, call: str) -> None:
    model = adapted(door)
    before = tiny.snapshot(model)
    with pytest.raises(LifecycleError, match="nobody"):
        getattr(model, call)("nobody")
    tiny.assert_same(model, before)


@both_doors
def test_a_second_adapter_that_cannot_be_leaves_the_model_alone(door: Door) -> None:
    model = adapted(door, bias="all")
    before, active = tiny.snapshot(model), logits(model)
    with pytest.raises(LifecycleError, match="only 1 adapter with bias"):
        model.add_adapter("other", config(bias="lora_only"))
    with pytest.raises(fastadapt.TargetError):
        model.add_adapter("other", config(target_modules=["nowhere"]))
    with pytest.raises(fastadapt.UnsupportedError):
        model.add_adapter("other", config(use_qalora=True))
    tiny.assert_same(model, before)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), active)


@both_doors
def test_deleting(door: Door) -> None:
    model = adapted(door)
    before = logits(model)
    one = [n for n, _ in model.named_parameters()]
    add(model)
    model.delete_adapter("other")
    assert torch.equal(logits(model), before)
    kept = [n for n, _ in model.named_parameters() if "o_proj" not in n]
    assert kept == [n for n in one if "o_proj" not in n]
    assert list(model.peft_config) == ["default"]


@both_doors
def test_deleting_the_active_one_activates_another(door: Door) -> None:
    model = adapted(door)
    add(model)
    model.set_adapter("other")
    want = logits(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="other"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), want)
    assert trainable(model) == {n for n, _ in tiny.adapter_parameters(model)}


@both_doors
def test_deleting_the_last_one_leaves_the_base(door: Door) -> None:
    model = adapted(door)
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(tiny.model().eval()))
    assert trainable(model) == set()


@both_doors
def test_deleting_a_merged_one_unmerges_it(door: Door) -> None:
    model = adapted(door)
    model.merge_adapter()
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(tiny.model().eval()))


def test_patch_twice_adds_an_adapter() -> None:
    model = adapted(fastadapt.patch)
    before = logits(model)
    assert fastadapt.patch(model, config(), "other") is model
    assert list(model.peft_config) == ["default", "other"]
    assert torch.equal(logits(model), before)
    with pytest.raises(LifecycleError, match="already exists"):
        fastadapt.patch(model, config())


def test_doors_do_not_mix() -> None:
    patched, wrapped = adapted(fastadapt.patch), adapted(fastadapt.get_peft_model)
    for model in (patched, wrapped):
        before = tiny.snapshot(model)
        with pytest.raises(LifecycleError, match="adapters already"):
            fastadapt.get_peft_model(model, config())
        tiny.assert_same(model, before)
    with pytest.raises(LifecycleError, match="adapters already"):
        fastadapt.patch(wrapped, config())
    with pytest.raises(LifecycleError, match="adapters already"):
        fastadapt.patch(wrapped.get_base_model(), config())
    with pytest.raises(LifecycleError, match="expected a model that fastadapt patched"):
        fastadapt.unpatch(tiny.model())


# off and on


@both_doors
def test_disabled_is_the_base_and_nothing_else_changes(door: Door) -> None:
    """PEFT's context freezes and thaws: a frozen adapter comes out trainable."""
    model = adapted(door)
    with_adapter, plain = logits(model), logits(tiny.model().eval())
    for flag in (True, False):
        for _, parameter in tiny.adapter_parameters(model):
            parameter.requires_grad_(flag)
        before = trainable(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
            assert trainable(model) == before
        assert trainable(model) == before
        assert torch.equal(logits(model), with_adapter)


@both_doors
def test_disabling_nests_and_survives_errors(door: Door) -> None:
    model = adapted(door)
    before = logits(model)
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert not torch.equal(logits(model), before)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model), before)


@both_doors
def test_disabling_a_merged_model(door: Door) -> None:
    model = adapted(door)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny.model().eval()))


# merging


@both_doors
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merging_keeps_outputs_and_unmerging_the_bits(door: Door, fmt: str, dora: bool) -> None:
    model = adapted(door, fmt=fmt, use_dora=dora, target_modules="all-linear")
    bits = {n: t.detach().clone() for n, t in tiny.tensors(model)}
    before = logits(model)
    model.merge_adapter()
    merged = logits(model)
    assert all(layer.merged for layer in layers(model))
    model.unmerge_adapter()
    after = dict(tiny.tensors(model))
    assert list(after) == list(bits)
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in bits.items())
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        effect = (logits(model) - before).norm()
    # what is lost is what rounding the merged weights to their format loses: bf16 keeps 8 bits,
    # a 4-bit or int8 weight may lose all but the direction, so its own rounding is the measure
    assert (merged - before).norm() <= rounding(model, fmt, before) + effect * 2**-16


def rounding(model: Any, fmt: str, before: Tensor) -> Tensor:
    """How far outputs move when the merged weights are exact up to one rounding to the format,
    measured on a float64 model: the merged weights rounded there, against those not rounded."""
    exact = (tiny.dequantised(tiny.model(fmt=fmt), "llama") if fmt in ("nf4", "int8")
             else tiny.model(fmt=fmt).double()).eval()  # fmt: skip
    for layer, plain in zip(layers(model), linears(exact), strict=True):
        with torch.no_grad():
            w, _ = layer.stack(["default"]).read()
            layer.frozen.write(w, None)
            plain.weight.copy_(layer.frozen.read()[0])
            layer.frozen.restore(layer_bits[0]) if (layer_bits := [None])[0] else None
    return (logits(exact) - before).norm()


def linears(model: Any) -> list[nn.Module]:
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
