# SPDX-License-Identifier: Apache-2.0
"""Activated LoRA: the base's outputs before the invocation tokens, the adapter's from there on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadapt
from fastadapt import invocation
from fastadapt.errors import FastAdaptWarning, LifecycleError, UnsupportedError
from fastadapt.testing import adapted, base_layer, check, config_of, layer_input
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

DOORS = [fastadapt.patch, fastadapt.get_peft_model]
both_doors = pytest.mark.parametrize("door", DOORS)
INVOKE, OTHER = [7, 8], [9]
IDS = torch.tensor([
    [11, 12, 7, 8, 13, 14, 15], [7, 8, 12, 13, 7, 8, 16], [11, 12, 13, 7, 14, 8, 15],
    [11, 9, 12, 13, 14, 15, 7],
])  # fmt: skip
STARTS: list[int | None] = [2, 4, None, None]
"""Of INVOKE, its last place in each row."""


def config(tokens: list[int] | None = INVOKE, **fields: Any) -> fastadapt.LoraConfig:
    return fastadapt.LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
           "alora_invocation_tokens": tokens, **fields}
    )  # fmt: skip


def made(door: Any, fmt: str = "fp32", **fields: Any) -> Any:
    torch.manual_seed(1)
    model = door(tiny.model(fmt=fmt), config(**fields))
    tiny.randomise(model)
    return model.eval()


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits  # type: ignore[no-any-return]


def by_hand(model: Any, ids: Tensor, starts: list[int | None]) -> Tensor:
    """Each layer as the definition says it: W x, and s B A x added where the position counts."""
    from fastadapt.layer import AdaptedLayer

    active = torch.tensor(
        [[s is not None and t >= s for t in range(ids.shape[1])] for s in starts]
    ).unsqueeze(-1)
    handles = []
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer):
            a, b = (layer.get_submodule(f"lora_{n}.default").weight for n in "AB")
            scale = layer.scaling["default"]

            def add(_: Any, args: Any, y: Tensor, a: Any = a, b: Any = b, s: float = scale) -> Any:
                return y + active * ((args[0] @ a.t()) @ b.t() * s)

            handles.append(layer.base_layer.register_forward_hook(add))
    with model.disable_adapter():
        y = logits(model, ids)
    for handle in handles:
        handle.remove()
    return y


@both_doors
def test_the_adapter_acts_from_its_invocation_on(door: Any) -> None:
    model = made(door)
    with model.disable_adapter():
        base = logits(model)
    got, want = logits(model), by_hand(model, IDS, STARTS)
    exact = by_hand(copy.deepcopy(model).double(), IDS, STARTS)
    check(got, want, exact)
    for i, start in enumerate(STARTS):
        before = len(IDS[i]) if start is None else start
        check(got[i, :before], base[i, :before], exact[i, :before])
        assert not torch.isclose(got[i, before:], base[i, before:]).all(-1).any()


@pytest.mark.parity
@pytest.mark.parametrize("lora_bias", [False, True])
def test_outputs_and_gradients_are_pefts(lora_bias: bool) -> None:
    peft = pytest.importorskip("peft")
    ours = made(fastadapt.get_peft_model, lora_bias=lora_bias).train()
    theirs = peft.get_peft_model(
        tiny.model(),
        peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM",
                        alora_invocation_tokens=INVOKE, lora_bias=lora_bias),
    ).train()  # fmt: skip
    held = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(held[name])
    outcomes = []
    for model in (ours, theirs):
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        outcomes.append((out.logits, grads))
    (y, grads), (y_peft, grads_peft) = outcomes
    assert (y - y_peft).norm() <= 2e-5 * y_peft.norm()
    assert grads.keys() == grads_peft.keys()
    for name, grad in grads_peft.items():
        assert (grads[name] - grad).norm() <= 2e-5 * grad.norm(), name


@both_doors
@pytest.mark.parametrize("options", [
    {}, {"use_cache": False}, {"num_beams": 2}, {"num_beams": 2, "use_cache": False},
], ids=str)  # fmt: skip
def test_generation_goes_on_from_the_invocation(door: Any, options: Any) -> None:
    """Cached, uncached and in beams: the tokens that one full forward at a time finds."""
    model = made(door)
    steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    got = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **steps, **options)
    if "num_beams" in options:
        again = model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), **steps,
            **{**options, "use_cache": not options.get("use_cache", True)},
        )  # fmt: skip
        assert torch.equal(got, again)
        return
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, by_hand(model, ids, STARTS)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, ids)


@both_doors
def test_a_cache_of_the_base_serves(door: Any) -> None:
    """The point of the method: what the base computed before the invocation is used as it is."""
    model = made(door)
    row = IDS[:1]
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(input_ids=row[:, :2], use_cache=True).past_key_values
        rest = model(input_ids=row[:, 2:], past_key_values=cache, use_cache=True).logits
    exact = by_hand(copy.deepcopy(model).double(), row, STARTS[:1])[:, 2:]
    check(rest, logits(model, row)[:, 2:], exact)


def test_a_batch_of_base_lora_and_two_invocations() -> None:
    model = made(fastadapt.get_peft_model)
    model.add_adapter("plain", config(None))
    model.add_adapter("other", config(OTHER))
    tiny.randomise(model)
    names = ["default", "plain", "__base__", "other"]
    got = logits(model, adapter_names=names)
    for i, name in enumerate(names):
        row = IDS[i : i + 1]
        if name == "__base__":
            with model.disable_adapter():
                want = logits(model, row)
        else:
            model.set_adapter(name)
            want = logits(model, row)
        check(got[i : i + 1], want, want.double(), cost=2e-6, what=name)


def test_given_offsets_are_taken_and_must_fit() -> None:
    model = made(fastadapt.get_peft_model)
    offsets = [None if s is None else IDS.shape[1] - s for s in STARTS]
    assert torch.equal(logits(model, alora_offsets=offsets), logits(model))
    embeds = model.get_input_embeddings()(IDS)
    with torch.no_grad():
        got = model(inputs_embeds=embeds, alora_offsets=offsets).logits
        assert torch.equal(got, logits(model))
        with pytest.warns(FastAdaptWarning, match="only inputs_embeds are provided. Disabling"):
            got = model(inputs_embeds=embeds).logits
        with model.disable_adapter():
            base = logits(model)
        check(got, base, base.double(), cost=2e-6)
        with pytest.raises(LifecycleError, match="for each row"):
            model(inputs_embeds=embeds, alora_offsets=[1, 2, 3])
    with pytest.raises(UnsupportedError, match="Beam search not yet supported for aLoRA"):
        model.generate(input_ids=IDS, num_beams=2, alora_offsets=offsets)
    logits(model)


@both_doors
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointed_gradients_of_two_forwards_are_their_own(door: Any, reentrant: bool) -> None:
    """Offsets of the first batch are there again in its backward, after the second went through;
    PEFT refuses the second."""

    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = made(door, lora_dropout=0.2).train()
        if checkpointed:
            model.enable_input_require_grads()
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        torch.manual_seed(3)
        one, two = (model(input_ids=ids, labels=ids).loss for ids in (IDS, IDS[:, 1:]))
        (one + 2 * two).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    want, got = gradients(False), gradients(True)
    assert want.keys() == got.keys()
    for name, grad in want.items():
        check(got[name], grad, grad.double(), cost=1e-6, what=name)


@both_doors
@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_quantised_bases(door: Any, fmt: str) -> None:
    model = made(door, fmt)
    got = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(got[2:], base[2:])
    assert not torch.equal(got[:2, 4:], base[:2, 4:])
    # products over rows of another number round differently, and int8 rounds what follows
    assert (got[0, :2] - base[0, :2]).abs().max() < 0.05 * base.abs().max()


def test_it_cannot_be_merged_and_leaves_no_trace(tmp_path: Path) -> None:
    model = tiny.model().eval()
    before = tiny.snapshot(model)
    wrapped = fastadapt.get_peft_model(model, config())
    tiny.randomise(wrapped)
    y = logits(wrapped)
    for safe in (False, True):
        with pytest.raises(UnsupportedError, match="aLoRA does not support merging"):
            wrapped.merge_adapter(safe_merge=safe)
    wrapped.save_pretrained(tmp_path)
    again = fastadapt.PeftModel.from_pretrained(tiny.model().eval(), tmp_path)
    assert again.peft_config["default"].alora_invocation_tokens == INVOKE
    assert torch.equal(logits(again), y)
    assert torch.equal(logits(copy.deepcopy(wrapped)), y)
    wrapped.unload()
    assert invocation.of(model) is None
    before["trainable"] = []
    tiny.assert_same(model, before)


def test_kinds_that_have_no_tokens() -> None:
    for kind in ("conv2d", "embedding"):
        with pytest.raises(UnsupportedError, match="alora_invocation_tokens"):
            adapted(base_layer("dense32", kind), config_of("lora", alora_invocation_tokens=[1]))


def test_without_a_call_of_the_model_a_layer_is_the_base() -> None:
    layer = adapted(base_layer("dense32", "linear"), config_of("lora", alora_invocation_tokens=[1]))
    x = layer_input("dense32", "linear", 3, 5).requires_grad_()
    y = layer(x)
    assert torch.equal(y, layer.base_layer(x))
    y.sum().backward()
    for name in "AB":
        grad = layer.get_submodule(f"lora_{name}.a0").weight.grad
        assert grad is not None, "PEFT's, and what DDP waits for"
        assert not grad.any()


def test_other_tasks_are_warned_of() -> None:
    with pytest.warns(FastAdaptWarning, match="only supported for CAUSAL_LM"):
        config(task_type="SEQ_CLS")


@pytest.mark.parametrize(("tokens", "places"), [
    ([7, 8], [2, 4, None, None]), ([9], [None, None, None, 1]), ([15], [6, None, 6, 5]),
    ([7, 8, 12, 13, 7, 8, 16], [None, 0, None, None]), ([1] * 8, [None] * 4), ([], [None] * 4),
])  # fmt: skip
def test_the_last_place_counts(tokens: list[int], places: list[int | None]) -> None:
    assert invocation.find(tokens, IDS) == places
