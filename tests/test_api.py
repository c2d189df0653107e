# SPDX-License-Identifier: Apache-2.0
"""PEFT's names, module paths and model-level functions: ``import fastadapt as peft`` works."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastadapt
from fastadapt.errors import (
    CheckpointError,
    ConfigError,
    FastAdaptWarning,
    LifecycleError,
    UnsupportedError,
)
from tests import tiny

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.a, self.b, self.head = nn.Linear(6, 9), nn.Linear(9, 5), nn.Linear(5, 3)

    def forward(self, ids: Any) -> Any:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.b(self.a(x).relu()))


IDS = torch.arange(8).reshape(2, 4)


def lora(**fields: Any) -> Any:
    fields = {"r": 4, "target_modules": ["a", "b"], "init_lora_weights": False, **fields}
    return fastadapt.LoraConfig(**fields)


def test_every_public_name_of_peft_is_there() -> None:
    absent = [n for n in peft.__all__ if not hasattr(fastadapt, n)]
    assert not absent
    for path in ("tuners", "utils", "helpers", "functional", "mapping", "auto", "tuners.lora",
                 "tuners.lora.layer", "tuners.tuners_utils", "utils.other", "utils.hotswap",
                 "utils.save_and_load", "mixed_model", "import_utils"):  # fmt: skip
        theirs = importlib.import_module(f"peft.{path}")
        ours = importlib.import_module(f"fastadapt.{path}")
        listed = getattr(theirs, "__all__", ())
        absent = [n for n in listed if not hasattr(ours, n)]
        assert not absent, path


def test_a_name_without_behaviour_says_so() -> None:
    from fastadapt import XLoraConfig

    for use in (fastadapt.compose_cartridge_adapters, fastadapt.create_arrow_model):
        with pytest.raises(UnsupportedError, match="not built yet"):
            use()
    with pytest.raises(UnsupportedError, match="not built yet"):
        fastadapt.get_peft_model(Net(), XLoraConfig(adapters={}))
    with pytest.raises(ImportError):
        from fastadapt.tuners.lora import Lienar  # noqa: F401


@pytest.mark.parametrize(
    ("path", "name"), [("a", "Linear"), ("embed", "Embedding"), ("conv", "Conv1d")]
)
def test_isinstance_asks_method_and_kind(path: str, name: str) -> None:
    module = importlib.import_module("fastadapt.tuners.lora.layer")
    model = fastadapt.get_peft_model(Net(), lora(target_modules=["a", "embed", "conv"]))
    layer = model.base_model.model.get_submodule(path)
    for other in ("Linear", "Embedding", "Conv1d", "Conv2d", "Linear4bit"):
        assert isinstance(layer, getattr(module, other)) == (other == name)
    assert isinstance(layer, module.LoraLayer)
    assert isinstance(
        layer, importlib.import_module("fastadapt.tuners.tuners_utils").BaseTunerLayer
    )
    assert not isinstance(layer, importlib.import_module("fastadapt.tuners.loha").LoHaLayer)
    assert isinstance(model.base_model, fastadapt.LoraModel)
    assert not isinstance(model.base_model, fastadapt.LoHaModel)
    assert repr(layer).startswith(f"lora.{name}(")


def test_status_equals_pefts() -> None:
    config = {"r": 4, "target_modules": ["a", "b"], "modules_to_save": ["head"]}
    found = []
    for library in (fastadapt, peft):
        model = library.get_peft_model(Net(), library.LoraConfig(**config))
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["a"]))
        states = [dataclasses.asdict(s) for s in (model.get_model_status(),
                                                  *model.get_layer_status())]  # fmt: skip
        with model.disable_adapter():
            # PEFT freezes the adapters meanwhile; here what trains stays as it was
            off = dataclasses.asdict(model.get_model_status())
            states.append({k: v for k, v in off.items()
                           if k not in ("trainable_params", "requires_grad")})  # fmt: skip
        model.merge_adapter()
        states.append(dataclasses.asdict(model.get_model_status()))
        found.append(states)
    assert found[0] == found[1]


def test_injection_and_state_dicts_are_inverse() -> None:
    model = fastadapt.get_peft_model(Net(), lora())
    state = fastadapt.get_peft_model_state_dict(model)
    bare = {k.removeprefix("base_model.model."): v for k, v in state.items()}
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        plain = fastadapt.inject_adapter_in_model(
            lora(target_modules=["a"]), Net(), low_cpu_mem_usage=True, state_dict=bare
        )
    assert all(p.is_meta for n, p in plain.named_parameters() if "lora_" in n)
    done = fastadapt.set_peft_model_state_dict(plain, bare, low_cpu_mem_usage=True)
    assert done == ([], [])
    torch.testing.assert_close(plain(IDS), model(IDS), rtol=0, atol=0)
    assert fastadapt.get_peft_model_state_dict(plain).keys() == bare.keys()
    bare["a.lora_A.weight"] = torch.zeros(2, 6)
    with pytest.raises(CheckpointError, match="size mismatch"):
        fastadapt.set_peft_model_state_dict(plain, bare)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        fastadapt.set_peft_model_state_dict(plain, bare, ignore_mismatched_sizes=True)
    base = fastadapt.get_base_model_state_dict(model)
    assert base.keys() == Net().state_dict().keys()
    fastadapt.set_base_model_state_dict(model, {k: torch.ones_like(v) for k, v in base.items()})
    assert (model.base_model.model.a.base_layer.weight == 1).all()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rank", [2, 6])
def test_hotswap_gives_the_other_adapters_outputs(
    tmp_path: Path, rank: int, prepared: bool
) -> None:
    from fastadapt.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    model = fastadapt.get_peft_model(Net(), lora())
    other = fastadapt.get_peft_model(Net(), lora(r=rank, lora_alpha=3))
    other.save_pretrained(tmp_path)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    weight = model.base_model.model.a.lora_A["default"].weight
    hotswap_adapter(model, str(tmp_path), "default")
    assert (weight.shape[0] == 6) >= prepared
    torch.testing.assert_close(model(IDS), other(IDS))
    fastadapt.get_peft_model(Net(), lora(target_modules=["head"])).save_pretrained(tmp_path)
    before = model(IDS)
    with pytest.raises(CheckpointError, match="unexpected keys"):
        hotswap_adapter(model, str(tmp_path), "default")
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=0)


def test_a_mixed_model_holds_several_methods() -> None:
    model = fastadapt.get_peft_model(Net(), lora(), mixed=True)
    model.add_adapter("x", fastadapt.LoHaConfig(target_modules=["a"], init_weights=False))
    alone = model(IDS)
    model.set_adapter(["default", "x"])
    assert not torch.allclose(model(IDS), alone)
    with pytest.raises(LifecycleError, match="not found, available"):
        model.set_adapter("y")
    with pytest.raises(LifecycleError, match="is not compatible"):
        model.add_adapter("z", fastadapt.IA3Config(target_modules=["a"], feedforward_modules=[]))
    with pytest.raises(NotImplementedError):
        model.save_pretrained("nowhere")


def test_a_hundred_adapters_cost_their_own_memory_and_switching_touches_layers_only() -> None:
    model = fastadapt.get_peft_model(Net(), lora())
    one = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    for i in range(99):
        model.add_adapter(f"n{i}", lora())
    everything = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert everything == 100 * one
    base = model.base_model.model.a.base_layer.weight.data_ptr()
    x = torch.randn(2, 6)
    for name in ("n7", "n98", "default"):
        model.set_adapter(name)
        alone = copy.deepcopy(model.base_model.model.a)
        alone.set_adapter(name)
        torch.testing.assert_close(model.base_model.model.a(x), alone(x), rtol=0, atol=0)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            f"base_model.model.{layer}.lora_{part}.{name}.weight"
            for layer in "ab" for part in "AB"
        ]  # fmt: skip
    assert model.base_model.model.a.base_layer.weight.data_ptr() == base


def test_scales_and_casts() -> None:
    from fastadapt.helpers import disable_input_dtype_casting, rescale_adapter_scale

    model = fastadapt.get_peft_model(Net(), lora())
    full = model(IDS)
    with rescale_adapter_scale(model, 0):
        scaled = model(IDS)
    with model.disable_adapter():
        torch.testing.assert_close(scaled, model(IDS))
    torch.testing.assert_close(model(IDS), full, rtol=0, atol=0)
    with disable_input_dtype_casting(model):
        assert not model.base_model.model.a.cast_input_dtype_enabled
    assert model.base_model.model.a.cast_input_dtype_enabled
    with (
        pytest.raises(ValueError, match="scaling is only supported"),
        rescale_adapter_scale(Net(), 2),
    ):
        pass
    fastadapt.cast_mixed_precision_params(model, torch.bfloat16)
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kinds == {torch.float32}


def test_saving_writes_a_card_and_keeps_its_text(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    model = fastadapt.get_peft_model(Net(), lora())
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data["library_name"] == "peft"
    assert "lora" in card.data.tags
    assert "transformers" not in card.data.tags
    card.text += "\nmine"
    card.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "mine" in text
    assert text.count("- PEFT ") == 1


def test_a_file_without_a_task_names_its_base_in_the_allowlist(tmp_path: Path) -> None:
    config = lora(auto_mapping={"parent_library": "os", "base_model_class": "system"})
    config.save_pretrained(tmp_path)
    for cls in (fastadapt.AutoPeftModel, fastadapt.AutoPeftModelForCausalLM):
        with pytest.raises(ConfigError, match="not in the import allowlist"):
            cls.from_pretrained(tmp_path)


def test_a_second_get_peft_model_keeps_the_other_adapters_and_starts_its_own_anew() -> None:
    net = Net()
    before = net(IDS)
    first = fastadapt.get_peft_model(net, lora())
    assert not torch.equal(first(IDS), before)
    with pytest.warns(UserWarning, match="You are trying to modify a model with PEFT for a second"):
        again = fastadapt.get_peft_model(net, lora(init_lora_weights=True))
    torch.testing.assert_close(again(IDS), before)
    with pytest.warns(UserWarning, match="for a second time"):
        other = fastadapt.get_peft_model(net, lora(target_modules=["head"]), "other")
    assert list(other.peft_config) == ["default", "other"]
    assert other.active_adapters == ["other"]
    other.set_adapter("default")
    torch.testing.assert_close(other(IDS), before)
    with pytest.warns(UserWarning, match="for a second time"):
        nested = fastadapt.get_peft_model(other, lora(target_modules=["base_model.model.conv"]))
    assert [n for n, p in nested.named_parameters() if p.requires_grad and ".conv." in n]
    assert nested(IDS).isfinite().all()
    assert not hasattr(other.unload(), "peft_config")


def test_what_get_peft_model_changes_in_a_config_is_said() -> None:
    config = lora(base_model_name_or_path="there", revision="v1")
    with pytest.warns(FastAdaptWarning) as caught:
        fastadapt.get_peft_model(Net(), config, "lora", revision="v2")
    said = [str(w.message) for w in caught]
    for text in ("renamed from 'there' to 'None'", "overwriting with revision v2", "the prefix"):
        assert any(text in s for s in said), text
    assert (config.base_model_name_or_path, config.revision) == (None, "v2")


def test_modules_tied_with_the_embedding() -> None:
    pefts = importlib.import_module("fastadapt.utils.other")
    net: Any = tiny.model("tied")
    assert pefts._get_module_names_tied_with_embedding(net) == ["lm_head"]
    assert pefts._get_no_split_modules(net) == set(net._no_split_modules)
    model = fastadapt.get_peft_model(net, lora(target_modules=["q_proj", "embed_tokens"]))
    assert model._get_module_names_tied_with_embedding() == ["lm_head"]
    net.config.tie_word_embeddings = False
    assert pefts._get_module_names_tied_with_embedding(model) == []
    assert pefts._get_module_names_tied_with_embedding(Net()) == []


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ParameterList])
def test_a_container_is_not_trained_whole(kind: type[nn.Module]) -> None:
    net = Net()
    net.held = kind([nn.Linear(2, 2) if kind is nn.ModuleList else nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        fastadapt.get_peft_model(net, lora(modules_to_save=["held"]))


def test_a_mixed_model_refuses_prompts_by_name() -> None:
    config = fastadapt.PrefixTuningConfig(num_virtual_tokens=2)
    with pytest.raises(ValueError, match="'PREFIX_TUNING' is not compatible with the `PeftMixed"):
        fastadapt.get_peft_model(Net(), config, mixed=True)


@pytest.mark.parametrize("fmt", ["fp32", "nf4", "int8"])
def test_a_layer_tells_the_format_of_its_base(fmt: str) -> None:
    quantization = importlib.import_module("fastadapt.utils.quantization_utils")
    model = fastadapt.get_peft_model(tiny.model("llama", fmt), lora(target_modules=["q_proj"]))
    layer = model.get_submodule(f"base_model.model.{model.targeted_module_names[0]}")
    held = layer.quantization_backend
    assert (held is None) == (fmt == "fp32")
    assert ("quantization_backend=" in repr(layer)) == (fmt != "fp32")
    for name, form in (("Bnb4bitBackend", "nf4"), ("Bnb8bitBackend", "int8")):
        assert isinstance(held, getattr(quantization, name)) == (form == fmt)


def test_the_trainers_mixin_adds_the_variational_loss() -> None:
    helpers = importlib.import_module("fastadapt.helpers")

    class Trainer:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            loss = model(**inputs).loss
            return (loss, "outputs") if return_outputs else loss

    class Mine(helpers.MontecloraTrainerMixin, Trainer):  # type: ignore[name-defined, misc]
        pass

    config = lora(target_modules=["q_proj"], monteclora_config={"num_samples": 2})
    model = fastadapt.get_peft_model(tiny.model(), config).train()
    assert any(isinstance(m, helpers.MontecloraSampler) for m in model.modules())
    torch.manual_seed(0)
    plain = Trainer().compute_loss(model, tiny.batch())
    want = plain + model._get_monteclora_loss()
    for outputs in (False, True):
        torch.manual_seed(0)
        found = Mine().compute_loss(model, tiny.batch(), return_outputs=outputs)
        loss = found[0] if outputs else found
        torch.testing.assert_close(loss, want)
        assert loss != plain
