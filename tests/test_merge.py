# SPDX-License-Identifier: Apache-2.0
"""What a merge keeps of an update: reported for each layer, and kept where that is asked for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadapt
from fastadapt.errors import FastAdaptWarning, LifecycleError
from fastadapt.layer import AdaptedLayer
from fastadapt.merge import LEAST, MergeReport
from fastadapt.testing import FORMATS, adapted, base_layer, check, config_of, layer_input
from fastadapt.weights.refit import nearest, refit
from fastadapt.weights.sixteen import Linear16
from tests import tiny
from tests.test_laws import same, stored
from tests.tiny import one_thread  # noqa: F401

pytest.importorskip("bitsandbytes")
QUANTISED = ("bnb4", "fp4", "bnb8")
SIZES = (0.003, 0.01, 0.03, 0.1)


def under(
    fmt: str, size: float, case: str = "lora", kind: str = "linear", count: int = 1
) -> AdaptedLayer:
    """A layer with adapters that each change its weight by ``size`` of its norm."""
    layer = adapted(base_layer(fmt, kind), *[config_of(case)] * count)
    norm = layer.frozen.read()[0].float().norm()
    with torch.no_grad():
        for name in layer.adapters:
            now = layer.get_delta_weight(name).norm() / norm
            layer.lora_B[name].weight.mul_(size / now)
    return layer


def share(before: Tensor, asked: Tensor, layer: AdaptedLayer, dim: Any = None) -> Tensor:
    """By its definition, in float64."""
    change = layer.frozen.read()[0].double() - before
    return (change * asked).sum(dim) / (asked * asked).sum(dim)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_share_is_reported(fmt: str, size: float) -> None:
    layer = under(fmt, size)
    before = layer.frozen.read()[0].double()
    asked = layer.get_delta_weight("a0").double()
    layer.merge()
    got: Any = layer.merge_share
    assert got.share == pytest.approx(share(before, asked, layer).item(), abs=1e-3)
    assert got.size == pytest.approx(size, rel=1e-2)
    assert got.stored == ""
    layer.unmerge()
    assert layer.merge_share is None


@pytest.mark.parametrize("fmt", ["bnb4", "fp4"])
def test_a_small_update_of_four_bits_is_lost_without_keep(fmt: str) -> None:
    layer = under(fmt, 0.01)
    layer.merge()
    assert layer.merge_share is not None
    assert layer.merge_share.share < 0.2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", ["refit", "16bit"])
@pytest.mark.parametrize("fmt", QUANTISED)
def test_what_is_asked_for_is_kept_and_unmerging_restores_the_bits(
    fmt: str, keep: str, size: float
) -> None:
    layer, x = under(fmt, size), layer_input(fmt, "linear", 3, 5)
    y, bits, module = layer(x), stored(layer.base_layer), layer.base_layer
    before = layer.frozen.read()[0].double()
    asked = layer.get_delta_weight("a0").double()
    layer.merge(keep=keep)
    got: Any = layer.merge_share
    assert got.share >= LEAST
    assert share(before, asked, layer).item() >= LEAST
    assert got.stored in ("", keep)
    if got.stored == "16bit":
        assert isinstance(layer.base_layer, Linear16)
        unit = torch.finfo(torch.bfloat16).eps / 2
        left = layer.frozen.read()[0].double() - before - asked
        assert left.norm() <= 2 * unit * before.norm(), "no more than bf16's rounding"
    else:
        assert layer.base_layer is module
    if got.stored == "refit":
        rows = share(before, asked, layer, 1)
        # what a row may lack is the rounding of decoded values to the format's dtype
        assert rows.min() >= LEAST
    merged_y = layer(x)
    assert merged_y.dtype == y.dtype
    assert not torch.equal(merged_y, y)
    layer.unmerge()
    assert layer.base_layer is module
    assert same(bits, stored(layer.base_layer))
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("fmt", QUANTISED)
@pytest.mark.parametrize("kind", ["linear", "linear_nobias"])
@pytest.mark.parametrize("keep", [None, "refit", "16bit"])
def test_a_bias_of_lora_is_merged(fmt: str, kind: str, keep: str | None) -> None:
    layer = under(fmt, 0.03, "lora_bias", kind)
    bits = stored(layer.base_layer)
    wanted = layer.stack(["a0"]).read()[1]
    layer.merge(keep=keep)
    assert layer.base_layer.bias is not None
    assert wanted is not None
    check(layer.base_layer.bias, wanted.to(layer.base_layer.bias.dtype), wanted.double())
    layer.unmerge()
    assert same(bits, stored(layer.base_layer))


@pytest.mark.parametrize("fmt", QUANTISED)
def test_two_merges_are_undone_one_by_one(fmt: str) -> None:
    layer, x = under(fmt, 0.03, count=2), layer_input(fmt, "linear", 3, 5)
    before, bits = layer(x), stored(layer.base_layer)
    layer.merge(adapter_names=["a0"], keep="16bit")
    once = layer(x)
    layer.merge(adapter_names=["a1"], keep="refit")
    layer.undo_merge()
    assert torch.equal(layer(x), once)
    layer.undo_merge()
    assert same(bits, stored(layer.base_layer))
    assert torch.equal(layer(x), before)


def test_the_greedy_choice_is_the_best_one() -> None:
    """Against every subset of steps, on rows of eight values."""
    torch.manual_seed(0)
    levels = torch.tensor([-1.0, -0.6, -0.25, 0.0, 0.2, 0.5, 1.0])
    before = levels[torch.randint(1, 6, (20, 8))]
    change = torch.randn(20, 8) * 0.05
    scale = torch.ones(20, 1)
    got = levels[refit(before, change, levels, scale)] - before
    start = nearest(before + change, levels, scale)
    beside = (start + change.sign().long()).clamp(0, len(levels) - 1)
    for i in range(20):
        asked = change[i]
        assert (got[i] @ asked) >= asked @ asked * (1 - 1e-6)
        best = min(
            (made - asked).square().sum().item()
            for n in range(256)
            for made in [_chosen(n, levels[start[i]], levels[beside[i]]) - before[i]]
            if made @ asked >= asked @ asked
        )
        # the greedy order is within its last item of the best
        largest = (levels[beside[i]] - levels[start[i]]).square().max().item()
        assert (got[i] - asked).square().sum().item() <= best + largest


def _chosen(subset: int, one: Tensor, other: Tensor) -> Tensor:
    mask = torch.tensor([bool(subset >> j & 1) for j in range(8)])
    return torch.where(mask, other, one)


def test_levels_that_a_block_does_not_use() -> None:
    """A block of zeros has a scale of zero and cannot change; no NaN comes of it."""
    w, d = torch.zeros(2, 4), torch.full((2, 4), 0.1)
    levels = torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(levels[refit(w, d, levels, torch.zeros(2, 1))].isfinite().all(),
                       torch.tensor(True))  # fmt: skip


# on a model


def small(model: Any, size: float = 0.02) -> Any:
    """Updates of ``size``."""
    tiny.randomise(model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, AdaptedLayer):
                norm = layer.frozen.read()[0].float().norm()
                now = layer.get_delta_weight("default").norm() / norm
                layer.lora_B["default"].weight.mul_(size / now)
    return model


def config() -> fastadapt.LoraConfig:
    return fastadapt.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize("door", [fastadapt.patch, fastadapt.get_peft_model])
def test_a_model_reports_and_warns_once(door: Any) -> None:
    model = small(door(tiny.model(fmt="nf4"), config())).eval()
    assert model.merge_report is None
    with pytest.warns(FastAdaptWarning, match="kept less than 90% of the update") as caught:
        report = model.merge_adapter()
    assert sum("of the update" in str(w.message) for w in caught) == 1
    assert isinstance(report, MergeReport)
    assert report is model.merge_report
    paths = [p for p, m in model.named_modules() if isinstance(m, AdaptedLayer)]
    assert list(report.layers) == [p.removeprefix("base_model.model.") for p in paths]
    assert report.share == min(m.share for m in report.layers.values()) < LEAST
    assert list(report.below()) == sorted(report.layers, key=lambda p: report.layers[p].share)
    assert str(report).count("\n") == len(paths)
    model.unmerge_adapter()
    assert model.merge_report is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAdaptWarning)
        report = model.merge_adapter(keep="refit")
        assert report.share >= LEAST
        model.unmerge_adapter()
        plain = model.merge_and_unload(keep="refit")
    assert plain.merge_report.layers == report.layers


@pytest.mark.parametrize("door", [fastadapt.patch, fastadapt.get_peft_model])
@pytest.mark.parametrize("safe", [False, True])
def test_words_that_keep_does_not_know(door: Any, safe: bool) -> None:
    model = small(door(tiny.model(), config()))
    before = tiny.snapshot(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        for bad in ({"keep": "all"}, {"keep_share": 2}, {"keep_share": "0.9"}):
            with pytest.raises(LifecycleError, match="keep"):
                call(safe_merge=safe, **bad)
            tiny.assert_same(model, before)


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
@pytest.mark.parametrize("keep", ["refit", "16bit"])
def test_a_merged_model_in_files_is_the_same(fmt: str, keep: str, tmp_path: Path) -> None:
    """Files that say which layers are not quantised any more."""
    from transformers import AutoModelForCausalLM

    model = small(fastadapt.patch(tiny.model(fmt=fmt), config()), 0.005).eval()
    plain = model.merge_and_unload(keep=keep)
    assert {m.stored for m in plain.merge_report.layers.values()} == {keep}
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    inputs = tiny.batch()
    inputs.pop("labels")
    wide = [type(m.get_submodule("model.layers.0.self_attn.q_proj")) for m in (plain, again)]
    assert (keep == "16bit") == (wide[1] is torch.nn.Linear), wide
    assert type(again.model.layers[0].self_attn.k_proj) is type(
        plain.model.layers[0].self_attn.k_proj
    )
    for layer in again.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, plain(**inputs).logits)
