# SPDX-License-Identifier: Apache-2.0
"""Quantised bases: made ready as PEFT does, and trained right after an evaluation.

On a CPU with AVX-512 bf16, bitsandbytes repacks a 4-bit weight at the first evaluation, in place.
The packed form has no backward and gives wrong gradients (bitsandbytes #2078). Most CPUs do not
have AVX-512, so the flag and the packed form are set by hand here.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadapt
from fastadapt import testing
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

pytest.importorskip("bitsandbytes")

REPACK = "support_avx512bf16_for_cpu"
DOORS = [
    pytest.param(fastadapt.patch, id="patch"),
    pytest.param(fastadapt.get_peft_model, id="get_peft_model"),
]
both_doors = pytest.mark.parametrize("door", DOORS)


def config(**fields: Any) -> fastadapt.LoraConfig:
    return fastadapt.LoraConfig(r=4, **{"target_modules": ["q_proj"], **fields})


def four_bit(model: nn.Module) -> dict[str, Any]:
    return {n.replace(".base_layer", "").removeprefix("base_model.model."): m
            for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}  # fmt: skip


def on_avx512(model: nn.Module) -> Any:
    """The model as bitsandbytes makes it on such a CPU."""
    for layer in four_bit(model).values():
        setattr(layer, REPACK, True)
    return model


def pack(model: nn.Module) -> Any:
    """The model after an evaluation on such a CPU."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    for layer in four_bit(on_avx512(model)).values():
        state = layer.weight.quant_state
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, state
        )
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(**tiny.batch()).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@both_doors
@pytest.mark.parametrize("fmt", ["nf4", "nf4-fp32", "int8"])
@pytest.mark.parametrize("targets", ["q_proj", "all-linear"])
def test_training_after_eval_generate_and_save(
    door: Any, fmt: str, targets: str, tmp_path: Path
) -> None:
    """Gradients before and after are the same, bit for bit; layers without adapters included."""
    wanted = targets if targets == "all-linear" else [targets]
    model = door(on_avx512(tiny.model(fmt=fmt)), config(target_modules=wanted))
    tiny.randomise(model)
    before = gradients(model)
    model.eval()
    inputs = tiny.batch()
    inputs.pop("labels")
    with torch.no_grad():
        model(**inputs)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path)
    after = gradients(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], g) for n, g in before.items())
    for layer in four_bit(model).values():
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.slow
@both_doors
def test_eval_train_merge_and_save_in_any_order(door: Any, tmp_path: Path) -> None:
    """Nothing is set by hand: on a CPU with AVX-512 bf16 the repacking is bitsandbytes' own."""
    inputs = tiny.batch()
    inputs.pop("labels")

    def logits(model: Any) -> Tensor:
        model.eval()
        with torch.no_grad():
            out: Tensor = model(**inputs).logits
        return out

    def fresh() -> Any:
        model = door(tiny.model(fmt="nf4"), config(target_modules="all-linear"))
        tiny.randomise(model)
        return model

    first = fresh()
    wanted = gradients(first)
    want = logits(first)
    first.merge_adapter()
    merged = logits(first)

    def step(model: Any, name: str, place: Path) -> None:
        if name == "eval":
            assert torch.equal(logits(model), want)
        elif name == "train":
            assert all(torch.equal(g, wanted[n]) for n, g in gradients(model).items())
        elif name == "merge":
            model.merge_adapter()
            assert torch.equal(logits(model), merged)
            model.unmerge_adapter()
        else:
            model.save_pretrained(place)
            again = fresh()
            again.load_adapter(place, "again")
            again.set_adapter("again")
            assert torch.equal(logits(again), want)

    for number, order in enumerate(permutations(["eval", "train", "merge", "save"])):
        model = fresh()
        for name in order:
            step(model, name, tmp_path / str(number))
        assert torch.equal(logits(model), want)
    plain = model.merge_and_unload()
    exact = tiny.dequantised(plain).eval()
    oracle = logits(exact)
    allowed = testing.budget(logits(exact.bfloat16()), oracle)
    for _again in range(2):  # bitsandbytes may repack now, and multiply in its own order, in bf16
        assert testing.error(logits(plain), oracle) <= allowed


@both_doors
def test_repacking_is_off_while_the_model_has_adapters(door: Any) -> None:
    """In every layer: gradients pass through those without an adapter, too."""
    model = on_avx512(tiny.model(fmt="nf4"))
    made = door(model, config())
    assert {getattr(layer, REPACK) for layer in four_bit(made).values()} == {False}
    made.add_adapter("other", config(target_modules=["k_proj"]))
    made.unload()
    assert {getattr(layer, REPACK) for layer in four_bit(model).values()} == {True}
    model = on_avx512(tiny.model(fmt="nf4"))
    door(model, config()).merge_and_unload()
    assert {getattr(layer, REPACK) for layer in four_bit(model).values()} == {True}
    assert all("_fastadapt" not in key for m in model.modules() for key in m.__dict__)


@pytest.mark.parity
def test_repacking_is_off_in_pefts_models_too() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(on_avx512(tiny.model(fmt="nf4")), config().to_peft())
    fastadapt.patch(model)
    assert {getattr(layer, REPACK) for layer in four_bit(model).values()} == {False}
    fastadapt.unpatch(model)
    assert {getattr(layer, REPACK) for layer in four_bit(model).values()} == {True}


@both_doors
def test_a_weight_that_was_packed_is_unpacked(door: Any) -> None:
    """Codes come back to the bit. Of each block's scale the packed form keeps bf16, and nesting it
    again rounds once more: what bitsandbytes itself gets back is the measure."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    plain = four_bit(tiny.model(fmt="nf4"))
    model = door(pack(tiny.model(fmt="nf4")), config())
    theirs = four_bit(pack(tiny.model(fmt="nf4")))
    assert four_bit(model).keys() == plain.keys()
    for name, layer in four_bit(model).items():
        state = layer.weight.quant_state
        assert not getattr(state, "packing_format_for_cpu", False)
        assert torch.equal(layer.weight.data, plain[name].weight.data), name
        weight = theirs[name].weight
        data, recovered = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
        assert torch.equal(
            dequantize_4bit(layer.weight.data, state), dequantize_4bit(data, recovered)
        )
    model.train()(**tiny.batch()).loss.backward()
    for _, parameter in tiny.adapter_parameters(model):
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}], ids=["default", "new"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parity
def test_made_ready_as_by_peft(fmt: str, options: Any, checkpointing: bool) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for library in (peft, fastadapt):
        model = library.prepare_model_for_kbit_training(
            tiny.model(fmt=fmt), checkpointing, gradient_checkpointing_kwargs=options
        )
        facts = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
        hooks = len(model.get_input_embeddings()._forward_hooks)
        found.append((facts, hooks, model.is_gradient_checkpointing))
    assert found[0] == found[1]


@both_doors
@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_the_usual_qlora_steps(door: Any, fmt: str) -> None:
    """prepare, adapt, train: the loss falls, and checkpointing changes no gradient."""
    grads = []
    for checkpointing in (False, True):
        model = fastadapt.prepare_model_for_kbit_training(
            tiny.model(fmt=fmt), use_gradient_checkpointing=checkpointing
        )
        torch.manual_seed(0)
        model = door(model, config(target_modules="all-linear", lora_dropout=0.1))
        tiny.randomise(model)
        torch.manual_seed(0)
        grads.append(gradients(model))
    assert all(torch.equal(grads[1][n], g) for n, g in grads[0].items())
    rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**tiny.batch()).loss
        rule.zero_grad()
        loss.backward()
        rule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_step_leaves_the_base_bits_alone(dora: bool) -> None:
    for fmt in ("nf4", "int8"):
        model = fastadapt.patch(tiny.model(fmt=fmt), config(use_dora=dora))
        before = {n: t.detach().clone() for n, t in tiny.tensors(model) if "lora_" not in n}
        gradients(model)
        now = dict(tiny.tensors(model))
        assert all(torch.equal(now[n], t) for n, t in before.items())


def test_outputs_are_those_of_the_dequantised_weights() -> None:
    """NF4 with fp32 compute is exact up to fp32: no rounding that a dense model does not have."""
    model = fastadapt.patch(tiny.model(fmt="nf4-fp32"), config(target_modules="all-linear"))
    exact = tiny.dequantised(tiny.model(fmt="nf4-fp32"))
    plain = tiny.dequantised(tiny.model(fmt="nf4-fp32")).float()
    wide = fastadapt.patch(exact, config(target_modules="all-linear"))
    dense = fastadapt.patch(plain, config(target_modules="all-linear"))
    for each in (model, wide, dense):
        tiny.randomise(each)
    got, want, truth = (m.eval()(**tiny.batch()).logits for m in (model, dense, wide))
    testing.check(got, want, truth)
