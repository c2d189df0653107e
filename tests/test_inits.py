# SPDX-License-Identifier: Apache-2.0
"""Starts of LoRA that take the base's weight apart: the layer stays what it was, on every format
and kind, and no other adapter is changed behind its back."""

from __future__ import annotations

import copy
import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadapt
from fastadapt.errors import ConfigError, LifecycleError
from fastadapt.testing import OneLayer, base_layer, layer_input
from tests import tiny

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:.*inputs will be cast from:UserWarning")

TAKING = ("pissa", "pissa_niter_8", "olora")
NF4_ROUNDING = 0.11
"""|| q(W) - W || / || W || of normal weights in NF4 is 0.09 (blocks of 64, nested absmax)."""


def config(init: Any, **fields: Any) -> Any:
    return fastadapt.LoraConfig(
        r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=init, **fields
    )


@pytest.mark.parametrize("kind", ["linear", "conv1d_gpt2", "conv2d"])
@pytest.mark.parametrize("init", TAKING)
def test_the_base_keeps_the_rest(init: str, kind: str) -> None:
    base, x = base_layer("dense32", kind), layer_input("dense32", kind, 3, 5)
    model = fastadapt.get_peft_model(OneLayer(copy.deepcopy(base)), config(init)).eval()
    layer = model.base_model.model.layer
    y = base(x)
    # a float32 product and its complement: some roundings of the largest output
    assert (model(x) - y).abs().max() <= 1e-5 * y.abs().max()
    taken = base.weight - layer.base_layer.weight
    assert (taken - layer.get_delta_weight("default")).abs().max() <= 1e-5
    assert taken.norm() > 0.05 * base.weight.norm()


@pytest.mark.parametrize("fmt", ["bnb4", "bnb8"])
@pytest.mark.parametrize("init", TAKING)
def test_a_quantised_base_starts_within_its_rounding(init: str, fmt: str) -> None:
    root = OneLayer(base_layer(fmt, "linear"))
    w = fastadapt.get_peft_model(copy.deepcopy(root), config(True)).base_model.model.layer.frozen
    before = w.read()[0].float()
    layer = fastadapt.get_peft_model(root, config(init)).base_model.model.layer
    now = layer.stack(["default"]).read()[0].float()
    assert (now - before).norm() <= NF4_ROUNDING * before.norm()


@pytest.mark.parametrize("init", TAKING)
def test_a_second_adapter_is_not_changed(init: str) -> None:
    model = fastadapt.get_peft_model(tiny.Plain(), fastadapt.LoraConfig(target_modules=["q_proj"]))
    tiny.randomise(model)
    before = tiny.snapshot(model)
    with pytest.raises(LifecycleError, match="path_initial_model_for_weight_conversion"):
        model.add_adapter(
            "b", fastadapt.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
        )
    tiny.assert_same(model, before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("alpha", [4, 12])
def test_loftq_starts_nearer_than_its_rounding(bits: int, alpha: int) -> None:
    """Also where alpha is not r, where PEFT's correction is alpha / r too large."""
    base = nn.Linear(64, 48)
    w = base.weight.detach().clone()
    options = fastadapt.LoftQConfig(loftq_bits=bits, loftq_iter=2)
    layer = fastadapt.get_peft_model(
        OneLayer(base),
        fastadapt.LoraConfig(
            r=4, lora_alpha=alpha, target_modules=["layer"], init_lora_weights="loftq",
            loftq_config=options,
        ),
    ).base_model.model.layer  # fmt: skip
    start = layer.stack(["default"]).read()[0] - w
    assert start.norm() < 0.95 * (layer.base_layer.weight - w).norm()


def test_replace_lora_weights_loftq(tmp_path: Any) -> None:
    tiny.model().save_pretrained(tmp_path)
    full = tiny.model().state_dict()
    model = fastadapt.get_peft_model(
        tiny.model("llama", "nf4"), fastadapt.LoraConfig(r=8, target_modules=["q_proj"])
    )
    path = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{path}")

    def off() -> float:
        w = layer.stack(["default"]).read()[0].float()
        return float((w - full[f"{path}.weight"]).norm())

    before = off()
    fastadapt.replace_lora_weights_loftq(model, str(tmp_path), callback=lambda *_: False)
    assert off() == before
    fastadapt.replace_lora_weights_loftq(model, str(tmp_path))
    assert off() < 0.9 * before
    with pytest.raises(ConfigError, match="No bnb LoRA module"):
        fastadapt.replace_lora_weights_loftq(tiny.Plain(), str(tmp_path))


def prepared(library: Any, init: str, model: nn.Module) -> Any:
    """The model under LoRA-GA or CorDA, each after its pass over the same data."""
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}
    if init == "lora_ga":
        made = library.LoraConfig(
            **fields, init_lora_weights=init, lora_ga_config=library.LoraGAConfig()
        )
        library.preprocess_loraga(model, made, lambda: model(x).square().mean().backward())
    elif library is fastadapt:
        made = library.LoraConfig(**fields, init_lora_weights=init)
        fastadapt.preprocess_corda(model, made, lambda: model(x))
    else:
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        made = library.LoraConfig(**fields, init_lora_weights=init, corda_config=CordaConfig())
        preprocess_corda(model, made, lambda: model(x))
    torch.manual_seed(3)
    return library.get_peft_model(model, made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["lora_ga", "corda"])
def test_starts_from_data_are_those_of_peft(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    # PEFT's file takes ``dataclass`` from a package that PEFT does not declare
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    plain = tiny.Plain()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    theirs, ours = (prepared(lib, init, copy.deepcopy(plain)) for lib in (peft, fastadapt))
    # singular vectors have a sign of their own choice: their product and the base are compared
    for i in range(2):
        for name in ("q_proj", "o_proj"):
            want, got = (m.base_model.model.layers[i][name] for m in (theirs, ours))
            close(got.get_delta_weight("default"), want.get_delta_weight("default"))
            close(got.base_layer.weight, want.base_layer.weight)
            assert not [k for k in vars(got.base_layer) if "eigens" in k or "loraga" in k]
    close(ours.eval()(x), plain(x))


def close(got: Tensor, want: Tensor) -> None:
    """To the roundings of an SVD and an inverse in float32, whose condition is below 1e3."""
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_bad_names_and_fields_say_what_was_meant() -> None:
    with pytest.raises(ConfigError, match="did you mean 'olora'"):
        fastadapt.LoraConfig(init_lora_weights="oloro")
    with pytest.raises(ConfigError, match="do not combine"):
        fastadapt.LoraConfig(use_dora=True, kasa_config={})
    with pytest.raises(ConfigError, match="must be specified"):
        fastadapt.LoraConfig(init_lora_weights="loftq")
    with pytest.raises(ConfigError, match="even"):
        fastadapt.get_peft_model(
            OneLayer(nn.Linear(8, 8)),
            fastadapt.LoraConfig(r=3, target_modules=["layer"], init_lora_weights="orthogonal"),
        )
    with pytest.raises(ConfigError, match="kasa_config: `KasaConfig` must be"):
        fastadapt.LoraConfig(kasa_config=3)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_saved_for_the_untouched_base(init: str, dora: bool, tmp_path: Any) -> None:
    """Twice the rank, the same scale, the same outputs; PEFT reads it too."""
    peft = pytest.importorskip("peft")
    kind = "llama"
    made = fastadapt.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init,
        use_dora=dora, rank_pattern={"down_proj": 2}, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = fastadapt.get_peft_model(tiny.model(kind), made)
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for _, parameter in tiny.adapter_parameters(model):
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    again = fastadapt.PeftModel.from_pretrained(tiny.model(kind), tmp_path / "plain")
    config = again.peft_config["default"]
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 12, True)
    batch = {k: v for k, v in tiny.batch(kind).items() if k != "labels"}
    with torch.no_grad():
        want = model.eval()(**batch).logits
        close(again(**batch).logits, want)
        theirs = peft.PeftModel.from_pretrained(tiny.model(kind), str(tmp_path / "plain"))
        close(theirs(**batch).logits, want)
    # the base of the second is untouched
    path = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert torch.equal(
        again.get_parameter(path), tiny.model(kind).model.layers[0].self_attn.q_proj.weight
    )


def eva_model(library: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    made = library.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"],
        init_lora_weights="eva", eva_config=library.EvaConfig(**options),
    )  # fmt: skip
    return library.get_peft_model(tiny.model(), made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_finds_what_peft_finds(rho: float) -> None:
    peft = pytest.importorskip("peft")
    batches = [tiny.batch(rows=6, seed=i) for i in range(4)]
    theirs, ours = eva_model(peft, rho=rho, tau=0.99), eva_model(fastadapt, rho=rho, tau=0.99)
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    fastadapt.initialize_lora_eva_weights(ours, batches, show_progress_bar=False)
    config = ours.peft_config["default"]
    layers = [m for m in ours.modules() if "default" in getattr(m, "lora_A", {})]
    assert sum(layer.r["default"] for layer in layers) == 4 * 6
    for layer in layers:
        a = layer.lora_A["default"].weight
        eye = torch.eye(a.shape[0])
        assert (a @ a.t() - eye).abs().max() <= 1e-4
        assert not layer.lora_B["default"].weight.any()
        assert a.requires_grad
        assert layer.scaling["default"] == 2
    wanted = {n: m.r["default"] for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    got = {n: m.r["default"] for n, m in ours.named_modules() if hasattr(m, "lora_A")}
    if rho == 1.0:
        assert got == wanted
    # PEFT's PCA is a randomised one: the subspace of the leading directions agrees
    for name in set(wanted) & set(got):
        p, q = (m.get_submodule(name).lora_A["default"].weight[:2] for m in (theirs, ours))
        assert torch.linalg.svdvals(p @ q.t()).min() > 0.9, name
    assert config.rank_pattern == {} or rho > 1


def test_eva_needs_data_and_its_start() -> None:
    with pytest.raises(ConfigError, match="dataloader is required"):
        fastadapt.initialize_lora_eva_weights(eva_model(fastadapt))
    with pytest.raises(ConfigError, match="empty"):
        fastadapt.initialize_lora_eva_weights(eva_model(fastadapt), [])
    plain = fastadapt.get_peft_model(tiny.Plain(), fastadapt.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="eva"):
        fastadapt.initialize_lora_eva_weights(plain, [])


def test_a_random_start_is_not_loaded_silently(tmp_path: Any) -> None:
    made = fastadapt.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights="pissa_niter_2", inference_mode=False
    )
    fastadapt.get_peft_model(tiny.Plain(), made).save_pretrained(tmp_path)
    with pytest.warns(fastadapt.FastAdaptWarning, match="starts at random"):
        fastadapt.PeftModel.from_pretrained(tiny.Plain(), tmp_path)
