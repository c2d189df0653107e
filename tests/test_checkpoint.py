# SPDX-License-Identifier: Apache-2.0
"""Adapter files against models: what fits is loaded, what does not is one error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastadapt
from fastadapt.errors import (
    CheckpointError,
    FastAdaptWarning,
)
from tests import tiny
from tests.adapter_files import (
    CONFIG,
    LOADERS,
    TENSORS,
    Q,
    adapted,
    into_new_name,
    logits,
    refused,
    rewrite,
)
from tests.tiny import one_thread  # noqa: F401


@pytest.mark.parametrize("way", LOADERS)
def test_what_is_saved_is_loaded(way: str, saved: Path) -> None:
    want = logits(adapted())
    start, load = LOADERS[way]
    model = load(start(), saved)
    model.set_adapter("loaded" if way == "load_adapter" else "default")
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_quantised_bases(fmt: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = fastadapt.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = fastadapt.patch(tiny.model(fmt=fmt), config).eval()
    model.save_pretrained(tmp_path)
    again = fastadapt.PeftModel.from_pretrained(tiny.model(fmt=fmt), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_loaded_for_inference_or_for_training(saved: Path) -> None:
    frozen = fastadapt.PeftModel.from_pretrained(tiny.model(), saved)
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert frozen.peft_config["default"].inference_mode
    live = fastadapt.PeftModel.from_pretrained(tiny.model(), saved, is_trainable=True)
    names = {n for n, _ in tiny.adapter_parameters(live)}
    assert {n for n, p in live.named_parameters() if p.requires_grad} == names
    assert not live.peft_config["default"].inference_mode
    assert json.loads((saved / CONFIG).read_text())["inference_mode"] is True


def test_saving_writes_the_adapter_and_nothing_else(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == {TENSORS, CONFIG}
    assert all("lora_" in key for key in load_file(saved / TENSORS))
    umask = os.umask(0)
    os.umask(umask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~umask for p in saved.iterdir())


def test_a_gathered_state_dict(tmp_path: Path) -> None:
    """As FSDP and DeepSpeed hand it over; with the model's keys or the wrapper's."""
    for door in (fastadapt.patch, fastadapt.get_peft_model):
        model = adapted(door)
        gathered = {k: v + 1 for k, v in model.state_dict().items() if "lora_" in k}
        model.save_pretrained(tmp_path, state_dict=gathered)
        own = {k.replace(".default", "").removeprefix("base_model.model."): v
               for k, v in gathered.items()}  # fmt: skip
        file = {k.removeprefix("base_model.model."): v
                for k, v in load_file(tmp_path / TENSORS).items()}  # fmt: skip
        assert file.keys() == own.keys()
        assert all(torch.equal(file[k], own[k]) for k in own)
        gathered.popitem()
        with pytest.raises(CheckpointError, match="lacks"):
            model.save_pretrained(tmp_path / "none", state_dict=gathered)
        assert not (tmp_path / "none").exists()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    for door in (fastadapt.patch, fastadapt.get_peft_model):
        adapted(door).save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


# files that do not fit


def test_every_problem_is_in_one_error(saved: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        gone, bent, broken, endless = sorted(tensors)[:4]
        tensors[Q.replace("layers.0", "layers.7")] = tensors.pop(gone)
        tensors[bent] = torch.zeros(3, 5)
        tensors[broken][0, 0] = float("nan")
        tensors[endless][0, 0] = float("inf")

    names = sorted(load_file(saved / TENSORS))[:4]
    rewrite(saved, spoil)
    refused(
        saved, CheckpointError, f"missing: {names[0]}", "unexpected: base_model.model.model.layers",
        f"shape of {names[1]}: expected", "got (3, 5)", f"not finite: {names[2]}",
        f"not finite: {names[3]}",
    )  # fmt: skip


def test_a_renamed_key_is_missing_and_unexpected_with_its_neighbour(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({Q.replace("q_proj", "q_prj"): t.pop(Q)}))
    refused(saved, CheckpointError, f"missing: {Q}", f"(near {Q})")


@pytest.mark.parametrize("how", ["half", "none", "more"])
def test_files_with_other_keys(how: str, saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        if how == "more":
            tensors["something.else"] = torch.ones(1)
        for key in sorted(tensors)[: {"half": len(tensors) // 2, "none": None, "more": 0}[how]]:
            del tensors[key]

    rewrite(saved, change)
    refused(saved, CheckpointError, "unexpected" if how == "more" else "missing")


def test_long_lists_of_problems_are_cut(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, lambda t: [t.update({f"k{i}": torch.ones(1)}) for i in range(5000)])
    with pytest.raises(CheckpointError, match="more") as caught:
        fastadapt.PeftModel.from_pretrained(tiny.model(), saved)
    assert len(str(caught.value)) < 4000


def test_leniently_what_fits_is_loaded_with_a_warning(saved: Path) -> None:
    want = load_file(saved / TENSORS)
    rewrite(saved, lambda t: t.update({"something.else": t.pop(Q)}))
    for start, load in LOADERS.values():
        with pytest.warns(FastAdaptWarning, match=r"missing(.|\n)*unexpected: something.else"):
            model = load(start(), saved, strict=False)
        name = "loaded" if load is into_new_name else "default"
        found = {n.replace(f".{name}", ""): p for n, p in model.named_parameters() if name in n}
        for key, value in want.items():
            live = found.get(key, found.get(key.removeprefix("base_model.model.")))
            assert torch.equal(live, value) == (key != Q), key


def test_the_report_names_what_did_not_fit(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({"something.else": t.pop(Q)}))
    with pytest.warns(FastAdaptWarning):
        report = adapted().load_adapter(saved, "loaded", strict=False)
    assert (report.missing_keys, report.unexpected_keys) == ([Q], ["something.else"])
    assert [p.partition(":")[0] for p in report.problems] == ["missing", "unexpected"]


def test_shapes_are_never_lenient(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({Q: torch.zeros(4, 63)}))
    with pytest.raises(CheckpointError, match=r"expected \(4, 64\), got \(4, 63\)"):
        fastadapt.PeftModel.from_pretrained(tiny.model(), saved, strict=False)


def test_an_adapter_that_changes_nothing_warns(tmp_path: Path) -> None:
    model = fastadapt.patch(tiny.model(), fastadapt.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.warns(FastAdaptWarning, match="changes nothing"):
        fastadapt.PeftModel.from_pretrained(tiny.model(), tmp_path)


def test_a_key_mapping_is_that_of_peft(saved: Path) -> None:
    want = logits(adapted())
    rewrite(saved, lambda t: [t.update({k.replace("self_attn", "attention"): t.pop(k)})
                              for k in list(t)])  # fmt: skip
    mapping = {r"\.attention\.": ".self_attn.", "self_attn": "never"}
    for start, load in LOADERS.values():
        model = load(start(), saved, key_mapping=mapping)
        model.set_adapter("loaded" if load is into_new_name else "default")
        assert torch.equal(logits(model), want)
    with pytest.raises(CheckpointError, match="one name"):
        fastadapt.PeftModel.from_pretrained(tiny.model(), saved, key_mapping={r".*": "same"})


def test_mismatched_sizes_are_left_out_when_asked(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({Q: torch.zeros(4, 63)}))
    for start, load in LOADERS.values():
        with pytest.warns(FastAdaptWarning, match=r"ignore_mismatched_sizes(.|\n)*\(4, 63\)"):
            load(start(), saved, ignore_mismatched_sizes=True)


# keys without PEFT's prefix


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_keys_without_the_prefix_are_the_same_keys(prefix: str, saved: Path) -> None:
    want = logits(adapted())
    rewrite(saved, lambda t: [t.update({prefix + k.removeprefix("base_model.model."): t.pop(k)})
                              for k in list(t)])  # fmt: skip
    for start, load in LOADERS.values():
        model = load(start(), saved)
        model.set_adapter("loaded" if load is into_new_name else "default")
        assert torch.equal(logits(model), want)


def test_shared_tensors_without_the_prefix(tmp_path: Path) -> None:
    """VeRA's projections belong to no module."""
    config = fastadapt.VeraConfig(target_modules=["q_proj"], r=4)
    model = fastadapt.get_peft_model(tiny.Plain(), config)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: [t.update({k.removeprefix("base_model.").removeprefix("model."):
                                           t.pop(k)}) for k in list(t)])  # fmt: skip
    again = fastadapt.PeftModel.from_pretrained(tiny.Plain(), tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_layers_that_share_a_tensor_cannot_load_two(tmp_path: Path) -> None:
    """Lily's A serves ``stride_A`` layers: a file with a value for each is of another adapter."""
    config = fastadapt.LilyConfig(target_modules=["q_proj"], r=4, num_B=2, stride_A=1)
    fastadapt.get_peft_model(tiny.Plain(), config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "stride_A": 2}))
    with pytest.raises(CheckpointError, match=r"two values of one tensor: .*0.*lily_A.*1.*lily_A"):
        fastadapt.PeftModel.from_pretrained(tiny.Plain(), tmp_path)
