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
    # an int8 layer quantises its input and is called as it is, so nothing may differ there
    exact = before if fmt == "int8" else logits(tiny.dequantised(tiny.model(fmt=fmt)).eval())
    testing.check(logits(model.eval()), before, exact.double())
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
        with pytest.raises((LifecycleError, fastadapt.ConfigError), match="expected"):
            model.add_adapter(name, config())
    tiny.assert_same(model, before)


@both_doors
def test_a_bad_first_name_leaves_the_model_alone(door: Door) -> None:
    model = tiny.model()
    before = tiny.snapshot(model)
    for name in ("a.b", "", "__base__"):
        with pytest.raises(LifecycleError, match="expected an adapter name"):
            door(model, config(), name)
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
        model.add_adapter("other", config(arrow_config={"top_k": 1}))
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
def test_a_merged_one_cannot_be_deleted(door: Door) -> None:
    """PEFT's rule: what is in the base's weights stays until it is unmerged."""
    model = adapted(door)
    add(model)
    model.merge_adapter()
    before = logits(model)
    with pytest.raises(LifecycleError, match=r"Cannot delete adapter.* while they"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), before)
    model.delete_adapter("other")
    assert torch.equal(logits(model), before)
    model.unmerge_adapter()
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
    before = tiny.snapshot(patched)
    with pytest.raises(LifecycleError, match="has adapters"):
        fastadapt.get_peft_model(patched, config())
    tiny.assert_same(patched, before)
    with pytest.raises(LifecycleError, match="has adapters"):
        fastadapt.patch(wrapped, config())
    with pytest.raises(LifecycleError, match="has adapters"):
        fastadapt.patch(wrapped.get_base_model(), config())
    with pytest.raises(LifecycleError, match="expected a model that fastadapt patched"):
        fastadapt.unpatch(tiny.model())


# off and on


@both_doors
def test_disabled_is_the_base_and_trains_nothing(door: Door) -> None:
    """As in PEFT no adapter trains inside; there a frozen one comes out trainable, here it is as
    it was."""
    model = adapted(door, modules_to_save=["lm_head"])
    with_adapter, plain = logits(model), logits(tiny.model().eval())
    for flag in (True, False):
        for _, parameter in tiny.adapter_parameters(model):
            parameter.requires_grad_(flag)
        before = trainable(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
            assert not trainable(model)
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
    frozen = trainable(model)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model), before)
    assert trainable(model) == frozen


@both_doors
def test_what_is_activated_while_off_trains_when_on(door: Door) -> None:
    model = adapted(door, modules_to_save=["lm_head"])
    model.add_adapter("other", config(modules_to_save=["lm_head"]))
    with model.disable_adapter():
        model.set_adapter("other")
    assert trainable(model)
    assert all(".other." in n for n in trainable(model))


@both_doors
def test_disabling_a_mixed_state_warns_and_enables_all_afterwards(door: Door) -> None:
    model = adapted(door)
    layers(model)[0].enable_adapters(False)
    with (
        pytest.warns(UserWarning, match="some adapter layers that are enabled"),
        model.disable_adapter(),
    ):
        assert all(layer.disable_adapters for layer in layers(model))
    assert not any(layer.disable_adapters for layer in layers(model))


@both_doors
def test_disabling_warns_where_biases_were_trained(door: Door) -> None:
    model = adapted(door, "gpt2", bias="all", target_modules=["c_attn"])
    with pytest.warns(UserWarning, match="bias configured to be 'all'"), model.disable_adapter():
        pass


@both_doors
def test_loading_leaves_other_adapters_trainability_alone(door: Door, tmp_path: Any) -> None:
    model = adapted(door)
    model.save_pretrained(tmp_path)
    before = trainable(model)
    model.load_adapter(tmp_path, "frozen")
    assert trainable(model) == before
    model.load_adapter(tmp_path, "trained", is_trainable=True)
    assert trainable(model) == before | {n.replace(".default", ".trained") for n in before}


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
    during = logits(model)
    assert all(layer.merged for layer in layers(model))
    model.unmerge_adapter()
    after = dict(tiny.tensors(model))
    assert list(after) == list(bits)
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in bits.items())
    assert torch.equal(logits(model), before)
    exact = (tiny.model() if fmt == "fp32" else tiny.dequantised(tiny.model(fmt=fmt))).double()
    plain = tiny.model(fmt=fmt).eval()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, AdaptedLayer):
                name = name.removeprefix("base_model.model.")
                w = merged(exact.get_submodule(name).weight, layer)
                exact.get_submodule(name).weight.copy_(w)
                stored(plain.get_submodule(name), w)
    testing.check(during, logits(plain), logits(exact.eval()))


def merged(w: Tensor, layer: Any) -> Tensor:
    """W + s B A, in float64, and DoRA's m (W + s B A) / its row norms."""
    a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    w = w + layer.scaling["default"] * b @ a
    if "lora_magnitude_vector" not in layer.adapter_layer_names:
        return w
    m = layer.lora_magnitude_vector["default"].weight.double()
    return w * (m / w.norm(dim=1)).unsqueeze(1)


def stored(layer: nn.Module, w: Tensor) -> None:
    """The weight in the layer's own format, by bitsandbytes itself."""
    old = layer.weight
    if old.is_floating_point():
        old.copy_(w)
    elif type(old).__name__ == "Params4bit":
        made = type(old)(w.float(), requires_grad=False, blocksize=old.blocksize,
                         quant_type=old.quant_type, compress_statistics=True).to("cpu")  # fmt: skip
        made.quant_state.dtype = old.quant_state.dtype
        layer.weight, layer.quant_state = made, made.quant_state
    else:
        layer.weight = type(old)(w.float(), requires_grad=False, has_fp16_weights=False).to("cpu")
        layer.state.CB = layer.state.SCB = None
        layer.init_8bit_state()


@both_doors
def test_merging_one_then_the_other(door: Door) -> None:
    model = adapted(door)
    add(model)
    before = {n: t.detach().clone() for n, t in tiny.tensors(model)}
    set_all(model, ["default", "other"])
    both, exact = logits(model), logits(copy.deepcopy(model).double())
    model.merge_adapter(adapter_names=["default"])
    assert all(layer.merged_adapters == ["default"] for layer in layers(model) if layer.merged)
    model.merge_adapter(adapter_names=["other"])
    testing.check(logits(model), both, exact)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in tiny.tensors(model))
    with pytest.warns(UserWarning, match="Already unmerged"):
        layers(model)[0].unmerge()


@both_doors
def test_switching_adapters_unmerges(door: Door) -> None:
    model = adapted(door)
    add(model)
    model.set_adapter("other")
    want = logits(model)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("other")
    assert torch.equal(logits(model), want)


@both_doors
def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing(door: Door) -> None:
    model = adapted(door)
    last = layers(model)[-1]
    with torch.no_grad():
        last.lora_B["default"].weight[0, 0] = float("nan")
    plain = {n: t.clone() for n, t in tiny.tensors(model) if "lora" not in n}
    kind = type(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(LifecycleError, match="NaN"):
            call(safe_merge=True)
        assert type(model) is kind
        assert not any(layer.merged for layer in layers(model))
        now = dict(tiny.tensors(model))
        assert all(torch.equal(now[n], t) for n, t in plain.items())


@both_doors
@pytest.mark.parametrize("fmt", FORMATS)
def test_merge_and_unload_gives_a_plain_model(door: Door, fmt: str) -> None:
    model = adapted(door, fmt=fmt)
    model.merge_adapter()
    want = logits(model)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert type(plain) is type(tiny.model(fmt=fmt))
    assert list(plain.state_dict()) == list(tiny.model(fmt=fmt).state_dict())
    assert torch.equal(logits(plain), want)
    assert not layers(plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("way", ["unload", "unpatch", "wrapper", "merged"])
def test_there_and_back(kind: str, fmt: str, way: str) -> None:
    """Class, attributes, submodules, keys, bits and trainability, as if nothing had been."""
    model = tiny.model(kind, fmt)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before = tiny.snapshot(model)
    state = {k: v for k, v in model.state_dict().items() if torch.is_tensor(v)}
    fields = {"target_modules": "all-linear", "bias": "all", "use_dora": True}
    door = fastadapt.get_peft_model if way == "wrapper" else fastadapt.patch
    made = door(model, config(**fields, task_type="SEQ_CLS" if kind == "bert" else None))
    tiny.randomise(made)
    made.train()(**tiny.batch(kind)).loss.backward()
    if way == "merged":
        made.merge_adapter()
    back = fastadapt.unpatch(made) if way == "unpatch" else made.unload()
    assert back is model
    model.zero_grad()
    if way == "wrapper":
        # PEFT's unload leaves what it froze frozen, and so does ours
        before["trainable"] = [n for n, p in model.named_parameters() if p.requires_grad]
    tiny.assert_same(model, before)
    now = model.state_dict()
    assert list(now) == list(before_keys(kind, fmt))
    assert all(torch.equal(now[k], v) for k, v in state.items())


def before_keys(kind: str, fmt: str) -> Any:
    return tiny.model(kind, fmt).state_dict()


# tied embeddings


@both_doors
def test_an_adapter_on_a_tied_embedding(door: Door, tmp_path: Any) -> None:
    """Merging into one of two tied layers unties them; the saved model says so."""
    from transformers import AutoModelForCausalLM

    model = adapted(door, "tied", target_modules=["embed_tokens", "q_proj"])
    before, exact = logits(model), logits(copy.deepcopy(model).double())
    plain = model.merge_and_unload()
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight
    assert not plain.config.tie_word_embeddings
    testing.check(logits(plain), before, exact)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(plain))


def test_tied_embeddings_stay_tied_without_a_merge() -> None:
    model = tiny.model("tied")
    fastadapt.unpatch(fastadapt.patch(model, config(target_modules=["embed_tokens", "q_proj"])))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


# mixed batches


@both_doors
def test_rows_through_their_own_adapters(door: Door) -> None:
    model = adapted(door)
    add(model)
    names = ["other", "__base__", "default", "other"]
    inputs = tiny.batch(rows=4)
    inputs.pop("labels")
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        mixed = run(model, names, **inputs)
        for i, name in enumerate(names):
            row = {k: v[i : i + 1] for k, v in inputs.items()}
            want, exact = alone(model, name, **row), alone(wide, name, **row)
            testing.check(mixed[i : i + 1], want, exact, what=name)


@both_doors
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_an_adapter_for_each_row(door: Door, beams: int) -> None:
    model = adapted(door)
    add(model)
    names = ["other", "__base__", "default"]
    inputs = tiny.batch(rows=3, length=5)
    inputs.pop("labels")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    if door is fastadapt.patch:
        with model.mixed_batch(names, repeat=beams):
            mixed = model.generate(**inputs, **options)
    else:
        mixed = model.generate(**inputs, **options, adapter_names=names)
    for i, name in enumerate(names):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        with active(model, name):
            assert torch.equal(model.generate(**row, **options)[0], mixed[i]), name


@both_doors
def test_mixed_batches_that_cannot_be(door: Door) -> None:
    model = adapted(door)
    inputs = tiny.batch(rows=2)
    with pytest.raises(LifecycleError, match="nobody"):
        run(model, ["default", "nobody"], **inputs)
    with pytest.raises(LifecycleError, match="Length of `adapter_names`"):
        run(model, ["default"], **inputs)
    model.merge_adapter()
    with pytest.raises(LifecycleError, match="merged"):
        run(model, ["default", "default"], **inputs)
    model.unmerge_adapter()
    logits(model)


# copies, modes, views


@both_doors
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(door: Door, fmt: str, how: str) -> None:
    model = adapted(door, fmt=fmt, use_dora=True)
    add(model)
    before = logits(model)
    made = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(made) is type(model)
    assert torch.equal(logits(made), before)
    assert trainable(made) == trainable(model)
    # nothing is shared: neither parameters nor states
    with torch.no_grad():
        for _, parameter in tiny.adapter_parameters(made):
            parameter.zero_()
    made.set_adapter("other")
    if how == "deepcopy" or fmt == "fp32":
        # (a pickle of a bitsandbytes weight comes back as a plain Parameter)
        made.merge_adapter()
    assert torch.equal(logits(model), before)
    assert not any(layer.merged for layer in layers(model))
    if door is fastadapt.patch:
        assert type(fastadapt.unpatch(made)) is type(tiny.model(fmt=fmt))


@both_doors
def test_a_copy_of_a_merged_model_unmerges(door: Door) -> None:
    model = adapted(door)
    before = logits(model)
    model.merge_adapter()
    made = copy.deepcopy(model)
    made.unmerge_adapter()
    assert torch.equal(logits(made), before)


@both_doors
def test_dropout_only_in_training(door: Door) -> None:
    model = adapted(door, lora_dropout=0.5)
    before = logits(model)
    assert torch.equal(before, logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    torch.manual_seed(7)
    one = logits(model)
    torch.manual_seed(7)
    assert torch.equal(logits(model), one)
    assert torch.equal(logits(model.eval()), before)


@both_doors
def test_casting_the_model(door: Door) -> None:
    """`.to()` replaces tensors; an adapter holds none of its own."""
    model = adapted(door, use_dora=True)
    before = logits(model)
    wide = logits(model.double())
    assert wide.dtype == torch.float64
    testing.check(before, logits(adapted(door, use_dora=True)), wide)
    assert torch.equal(logits(model.float()), before)


@both_doors
def test_reference_is_a_view_of_the_base(door: Door) -> None:
    model = adapted(door)
    before, plain = logits(model), logits(tiny.model().eval())
    view = fastadapt.reference(model)
    assert torch.equal(view(**tiny.batch()).logits, plain)
    assert not view(**tiny.batch()).logits.requires_grad
    assert [p.data_ptr() for p in view.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert isinstance(view, type(model))
    model.train()
    view.eval()
    assert model.training
    model.eval()
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        for _, parameter in tiny.adapter_parameters(model):
            parameter.add_(1)
    assert torch.equal(view(**tiny.batch()).logits, plain)
    with pytest.raises(LifecycleError, match="fastadapt adapted"):
        fastadapt.reference(tiny.model())


# training


@both_doors
@pytest.mark.parametrize("fmt", ["fp32", "nf4"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_keeps_gradients(door: Door, fmt: str, reentrant: bool) -> None:
    """With dropout: the mask is drawn again from the same state."""
    want = gradients(adapted(door, fmt=fmt, lora_dropout=0.2))
    model = adapted(door, fmt=fmt, lora_dropout=0.2)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = gradients(model)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], g) for n, g in want.items())


@pytest.mark.parametrize("fmt", ["fp32", "nf4"])
def test_a_compiled_block_is_the_same(fmt: str) -> None:
    """Forward and backward through aot_eager, without a break in the graph."""
    model = adapted(fastadapt.patch, fmt=fmt, target_modules="all-linear")
    block = model.model.layers[0].mlp
    x = torch.randn(2, 5, tiny.HIDDEN).to(model.dtype)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    want, got = step(block, x), step(compiled, x)
    torch._dynamo.reset()
    base = tiny.model() if fmt == "fp32" else tiny.dequantised(tiny.model(fmt=fmt))
    wide = fastadapt.patch(base.double(), config(target_modules="all-linear"))
    exact = step(copied(wide, model).model.layers[0].mlp, x.double())
    for name, value in want.items():
        testing.check(got[name], value, exact[name], what=name)


@pytest.mark.slow
@both_doors
def test_a_compiled_model_is_the_same(door: Door) -> None:
    model = adapted(door)
    want = gradients(model)
    torch._dynamo.reset()
    got = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    exact = gradients(copied(door(tiny.model().double(), config()), model))
    for name, grad in want.items():
        testing.check(got[name], grad, exact[name], what=name)


@both_doors
def test_amp(door: Door) -> None:
    """Under autocast gradients are those of PEFT's order of things: finite, in the parameters'
    dtype, and close to the plain ones within bf16's own rounding."""
    model = adapted(door)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**tiny.batch()).loss
    loss.backward()
    for name, parameter in tiny.adapter_parameters(model):
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


@both_doors
def test_one_line_about_parameters(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(door)
    model.print_trainable_parameters()
    trained, total = model.get_nb_trainable_parameters()
    line = f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: "
    assert capsys.readouterr().out == f"{line}{100 * trained / total:.4f}\n"
    assert trained == sum(p.numel() for _, p in tiny.adapter_parameters(model))


# helpers


def set_all(model: Any, names: list[str]) -> None:
    """Several at once: PEFT's wrapper takes them on its inner model."""
    getattr(model, "base_model", model).set_adapter(names) if isinstance(
        model, fastadapt.PeftModel
    ) else model.set_adapter(names)


def run(model: Any, names: list[str], **inputs: Tensor) -> Tensor:
    if isinstance(model, fastadapt.PeftModel):
        return model(**inputs, adapter_names=names).logits  # type: ignore[no-any-return]
    with model.mixed_batch(names):
        return model(**inputs).logits  # type: ignore[no-any-return]


def alone(model: Any, name: str, **inputs: Tensor) -> Tensor:
    with active(model, name):
        return model(**inputs).logits  # type: ignore[no-any-return]


def active(model: Any, name: str) -> Any:
    if name == "__base__":
        return model.disable_adapter()
    model.set_adapter(name)
    return warnings.catch_warnings()


def copied(model: Any, source: Any) -> Any:
    given = dict(tiny.adapter_parameters(source))
    with torch.no_grad():
        for name, parameter in tiny.adapter_parameters(model):
            parameter.copy_(given[name])
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    model(**tiny.batch()).loss.backward()
    return {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in model.named_parameters()
            if p.grad is not None}  # fmt: skip


def step(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, the input's too."""
    x = x.clone().requires_grad_()
    y = block(x)
    block.zero_grad()
    y.backward(torch.ones_like(y))
    grads = {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in block.named_parameters()
             if p.grad is not None}  # fmt: skip
    return {"y": y.detach(), "dx": x.grad, **grads}
