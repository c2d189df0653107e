# SPDX-License-Identifier: Apache-2.0
"""Modules that are trained whole beside an adapter: one copy each, the original kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastadapt
from fastadapt.errors import LifecycleError, TargetError, UnsupportedError
from fastadapt.modules_to_save import ModulesToSaveWrapper
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

DOORS = [
    pytest.param(fastadapt.patch, id="patch"),
    pytest.param(fastadapt.get_peft_model, id="get_peft_model"),
]
both_doors = pytest.mark.parametrize("door", DOORS)


def config(**fields: Any) -> fastadapt.LoraConfig:
    given = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], **fields}
    return fastadapt.LoraConfig(**given)


def adapted(door: Any, **fields: Any) -> Any:
    model = door(tiny.model(), config(**fields)).eval()
    move(model, 1.0)
    return model


def move(model: Any, by: float, name: str = "default") -> None:
    """Train: every copy of ``name`` takes another value."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"modules_to_save.{name}" in key:
                parameter.add_(by)


def logits(model: Any) -> Tensor:
    inputs = tiny.batch()
    inputs.pop("labels")
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


@both_doors
def test_the_copy_trains_and_the_original_does_not(door: Any) -> None:
    model = door(tiny.model(), config())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    copies = {n for n, _ in model.named_parameters() if "modules_to_save" in n}
    assert copies
    assert trained == copies | {n for n, _ in tiny.adapter_parameters(model)}
    model(**tiny.batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


@both_doors
def test_it_starts_as_the_original_and_shares_nothing(door: Any) -> None:
    base = tiny.model().eval()
    before = logits(base)
    model = door(base, config()).eval()
    assert torch.equal(logits(model), before)
    move(model, 1.0)
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@both_doors
def test_attributes_come_from_the_copy_in_use(door: Any) -> None:
    model = adapted(door)
    head = model.get_output_embeddings()
    assert isinstance(head, ModulesToSaveWrapper)
    assert head.out_features == tiny.VOCABULARY
    assert head.weight is head.modules_to_save["default"].weight
    with model.disable_adapter():
        assert head.weight is head.original_module.weight
    with pytest.raises(AttributeError, match="nothing"):
        _ = head.nothing


@both_doors
def test_one_copy_an_adapter(door: Any) -> None:
    model = adapted(door)
    one = logits(model)
    model.add_adapter("other", config())
    move(model, 2.0, "other")
    assert torch.equal(logits(model), one)
    model.set_adapter("other")
    two = logits(model)
    assert not torch.equal(two, one)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".other." in n for n in trained)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    model.delete_adapter("other")
    assert torch.equal(logits(model), one)
    assert not [n for n, _ in model.named_parameters() if ".other." in n]


@both_doors
def test_two_copies_cannot_be_active_at_once(door: Any) -> None:
    model = adapted(door)
    model.add_adapter("other", config())
    before, active = tiny.snapshot(model), logits(model)
    with pytest.raises(LifecycleError, match="Only one adapter"):
        model.set_adapter(["default", "other"])
    tiny.assert_same(model, before)
    assert torch.equal(logits(model), active)


@both_doors
def test_an_adapter_without_a_copy_uses_the_original(door: Any) -> None:
    model = adapted(door)
    model.add_adapter("other", config(modules_to_save=None))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(tiny.model().eval()))


@both_doors
def test_rows_through_their_own_copies(door: Any) -> None:
    model = adapted(door)
    model.add_adapter("other", config())
    move(model, 2.0, "other")
    names = ["other", "__base__", "default"]
    inputs = tiny.batch(rows=3)
    inputs.pop("labels")
    with torch.no_grad(), model.mixed_batch(names):
        mixed = model(**inputs).logits
    for i, name in enumerate(names):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    want = model(**row).logits[0]
            else:
                model.set_adapter(name)
                want = model(**row).logits[0]
        assert torch.equal(mixed[i], want), name


@both_doors
def test_merging_keeps_the_copy_and_unloading_the_original(door: Any) -> None:
    model = adapted(door)
    want = logits(model)
    plain = model.merge_and_unload()
    assert torch.equal(logits(plain), want)
    assert type(plain.lm_head) is torch.nn.Linear
    base = tiny.model()
    before = tiny.snapshot(base)
    back = adapted(door).unload()
    assert torch.equal(logits(back), logits(base.eval()))
    assert list(tiny.snapshot(back)["tensors"]) == list(before["tensors"])


@both_doors
@pytest.mark.parametrize("active", ["default", "other"])
def test_a_file_holds_the_adapters_own_copy(door: Any, active: str, tmp_path: Path) -> None:
    """Whichever adapter is active when it is saved, the biases of bias="all" too."""
    model = door(tiny.model("bert"), config(
        target_modules=["query"], task_type="SEQ_CLS", modules_to_save=None, bias="all",
    ))  # fmt: skip
    move(model, 1.0)
    model.add_adapter("other", config(target_modules=["query"], task_type="SEQ_CLS",
                                      modules_to_save=None))  # fmt: skip
    move(model, 2.0, "other")
    model.set_adapter(active)
    model.save_pretrained(tmp_path)
    base = tiny.model("bert").classifier
    for folder, by in ((tmp_path, 1.0), (tmp_path / "other", 2.0)):
        file = load_file(folder / "adapter_model.safetensors")
        for leaf, value in base.state_dict().items():
            assert torch.equal(file[f"base_model.model.classifier.{leaf}"], value + by)


@both_doors
def test_an_embedding_that_is_trained_is_saved_trained(door: Any, tmp_path: Path) -> None:
    """Though the file holds embeddings of the base, too, when an adapter sits on one of them."""
    model = adapted(door, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    want = tiny.model().model.embed_tokens.weight + 1
    assert torch.equal(file["base_model.model.model.embed_tokens.weight"], want)
    again = fastadapt.PeftModel.from_pretrained(tiny.model(), tmp_path)
    assert torch.equal(logits(again), logits(model))


@both_doors
def test_the_head_of_a_task_is_trained_without_asking(door: Any) -> None:
    model = door(tiny.model("bert"), fastadapt.LoraConfig(task_type="SEQ_CLS"))
    assert isinstance(model.classifier, ModulesToSaveWrapper)
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]


@both_doors
@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_a_quantised_module_cannot_be_trained_whole(door: Any, fmt: str) -> None:
    model = tiny.model(fmt=fmt)
    before = tiny.snapshot(model)
    with pytest.raises(UnsupportedError, match=r"up_proj.*4-bit|up_proj.*int8|up_proj.*quantised"):
        door(model, config(modules_to_save=["up_proj"]))
    tiny.assert_same(model, before)


@both_doors
def test_a_name_without_a_module(door: Any) -> None:
    model = tiny.model()
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match=r"no module is named.*lm_hed"):
        door(model, config(modules_to_save=["lm_head", "lm_hed"]))
    tiny.assert_same(model, before)


@both_doors
@pytest.mark.parametrize("inner", ["layers.0", "self_attn"])
def test_targets_inside_a_module_that_is_trained_whole_are_left_out(door: Any, inner: str) -> None:
    """PEFT's rule: what is trained whole gets no adapter; and it is called with keywords only."""
    model = door(tiny.model(), config(target_modules=["q_proj", "up_proj"],
                                      modules_to_save=[inner]))  # fmt: skip
    adapted = {n for n, m in model.named_modules() if n.endswith(("q_proj", "up_proj"))
               and hasattr(m, "base_layer")}  # fmt: skip
    assert adapted
    assert not [n for n in adapted if inner in n]
    model(**tiny.batch()).loss.backward()


def test_rows_of_a_module_that_gives_no_tensor() -> None:
    model = fastadapt.get_peft_model(
        nn.ModuleDict({"gru": nn.GRU(4, 4), "lin": nn.Linear(4, 4)}),
        fastadapt.LoraConfig(target_modules=["lin"], modules_to_save=["gru"]),
    )
    wrapper = model.base_model.model["gru"]
    with pytest.raises(TypeError, match="Mixed batching is only supported for the following"):
        wrapper(torch.zeros(2, 3, 4), adapter_names=["default", "__base__"])
