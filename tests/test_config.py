# SPDX-License-Identifier: Apache-2.0
"""Configurations: PEFT's fields and json both ways, and one clear error for what cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastadapt
from fastadapt.config import MAX_CONFIG_BYTES, PeftConfig, PeftType, as_config, from_dict
from fastadapt.errors import (
    CheckpointError,
    ConfigError,
    FastAdaptError,
    FastAdaptWarning,
    UnsupportedError,
)
from fastadapt.methods import METHODS, UNBUILT, config_of
from fastadapt.methods.lora import MAX_RANK
from tests import tiny

CONFIG = "adapter_config.json"

USED = {
    "megatron_config": {"tensor_model_parallel_size": 1},
    "arrow_config": {"top_k": 1},
}
"""A value that turns each field on whose behaviour is not built yet."""

FILLED = {
    "r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "bias": "lora_only", "use_rslora": True,
    "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}, "task_type": "CAUSAL_LM",
    "target_modules": ["v_proj", "q_proj"], "exclude_modules": ["lm_head"],
    "modules_to_save": ["lm_head"], "layers_to_transform": [0], "layers_pattern": "layers",
    "init_lora_weights": "gaussian", "use_dora": True, "base_model_name_or_path": "somewhere",
    "revision": "main",
}  # fmt: skip

JUNK = [
    None, True, 0, -1, 1.5, float("nan"), float("inf"), 1 << 70, "", "junk", "(", [], [1], ["x"],
    [["x"]], [None], {}, {"x": 1}, {"x": "y"}, {"(": 2}, {1: 1}, object(), b"junk", {3}, (1, 2),
]  # fmt: skip


@pytest.mark.parametrize("r", [0, -1, MAX_RANK + 1, 3_000_000, 1 << 70, 1.5, "8", None, True, [8]])
def test_rank_is_checked(r: Any) -> None:
    with pytest.raises(ConfigError, match=r"`?r`?: |`r` should"):
        fastadapt.LoraConfig(r=r)
    with pytest.raises(ConfigError, match=r"`?r`?: |`r` should|rank_pattern: "):
        fastadapt.LoraConfig(rank_pattern={"q_proj": r})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", float("nan")), ("lora_alpha", 1e30), ("lora_alpha", "16"),
        ("alpha_pattern", {"q_proj": "x"}), ("alpha_pattern", [1]), ("rank_pattern", "q_proj"),
        ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("lora_dropout", "0"),
        ("lora_dropout", float("nan")), ("bias", True), ("task_type", 5),
        ("target_modules", 5), ("target_modules", [1]), ("exclude_modules", {"a": 1}),
        ("modules_to_save", "lm_head"), ("modules_to_save", [1]), ("layers_to_transform", "1"),
        ("layers_to_transform", ["1"]), ("layers_pattern", 3),
        ("init_lora_weights", 3.5), ("use_dora", "yes"), ("use_rslora", 1.5),
        ("inference_mode", "no"),
    ],
)  # fmt: skip
def test_values_of_a_wrong_kind_are_refused_by_name(field: str, value: Any) -> None:
    others = {"layers_pattern": {"layers_to_transform": [0]}}.get(field, {})
    with pytest.raises(ConfigError, match=field):
        fastadapt.LoraConfig(**{field: value}, **others)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(fastadapt.LoraConfig)])
def test_junk_gives_our_error_or_none(field: str) -> None:
    """Whatever a file holds: a config, or one error of ours; never another exception."""
    for value in JUNK:
        values = {"peft_type": "LORA", "target_modules": ["q_proj"], field: value}
        try:
            config = PeftConfig.from_peft_type(**values)
            fastadapt.patch(tiny.Plain(), config)
        except FastAdaptError:
            pass


@pytest.mark.parametrize("clash", [
    {"target_modules": ".*", "layers_to_transform": [0]},
    {"layers_pattern": "layers"},
    {"use_dora": True, "lora_bias": True},
    {"task_type": "WRITING"},
])  # fmt: skip
def test_clashes(clash: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        fastadapt.LoraConfig(**clash)


@pytest.mark.parametrize("field", sorted(USED))
def test_fields_that_are_not_built_say_so(field: str) -> None:
    model = tiny.Plain()
    before = tiny.snapshot(model)
    config = fastadapt.LoraConfig(target_modules=["q_proj"], **{field: USED[field]})
    for door in (fastadapt.patch, fastadapt.get_peft_model):
        with pytest.raises(UnsupportedError, match=field):
            door(model, config)
        tiny.assert_same(model, before)


def test_every_default_is_built() -> None:
    fastadapt.LoraConfig().check_built()


def test_the_fields_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    ours = {f.name: f for f in dataclasses.fields(fastadapt.LoraConfig)}
    theirs = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert set(ours) == theirs
    want, got = peft.LoraConfig().to_dict(), fastadapt.LoraConfig().to_dict()
    assert got == want
    # every field is either done or named as not built
    assert set(USED) <= theirs


@pytest.mark.parametrize("values", [{}, FILLED], ids=["defaults", "filled"])
def test_json_both_ways(values: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = fastadapt.LoraConfig(**values), peft.LoraConfig(**values)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "ours")).to_dict() == theirs.to_dict()
    assert PeftConfig.from_pretrained(tmp_path / "theirs").to_dict() == ours.to_dict()
    assert as_config(theirs).to_dict() == ours.to_dict()
    back = ours.to_peft()
    assert isinstance(back, peft.LoraConfig)
    assert back.to_dict() == theirs.to_dict()


def test_a_dict_of_fields() -> None:
    values = {"peft_type": "LORA", "r": 4}
    assert from_dict(values).r == 4  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"lora_alpa.*did you mean 'lora_alpha'"):
        from_dict({**values, "lora_alpa": 4})
    with pytest.raises(ConfigError, match="peft_type"):
        from_dict({"r": 4})


@pytest.mark.parametrize("thing", [None, 5, "LORA", ["LORA"], {"peft_type": "LORRA"}])
def test_what_is_no_config(thing: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected|did you mean"):
        as_config(thing)


def test_methods_that_are_not_built_say_so() -> None:
    absent = sorted(set(PeftType.__members__) - set(METHODS))
    if not absent:
        pytest.skip("every method of PEFT is built")
    made = as_config({"peft_type": absent[0]})
    with pytest.raises(UnsupportedError, match=absent[0]):
        fastadapt.get_peft_model(torch.nn.Linear(2, 2), made)


def test_an_unknown_bias_is_refused_by_the_model() -> None:
    """A configuration takes it, as PEFT's does."""
    config = fastadapt.LoraConfig(bias="some", target_modules=["layer"])
    with pytest.raises(NotImplementedError, match="Requested bias: some, is not implemented"):
        fastadapt.get_peft_model(torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2)}), config)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"", CheckpointError, "JSON object"),
        (b"{", CheckpointError, "JSON object"),
        (b"\xff\xfe\x00", CheckpointError, "JSON object"),
        (b"[1, 2]", CheckpointError, "got list"),
        (b"null", CheckpointError, "JSON object"),
        (b"[" * 200_000, CheckpointError, "JSON object"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, CheckpointError, "JSON object"),
        (b'"' + b"x" * MAX_CONFIG_BYTES + b'"', CheckpointError, str(MAX_CONFIG_BYTES)),
        (b'{"r": 8}', ConfigError, "peft_type"),
        (b'{"peft_type": "MAGIC"}', ConfigError, "MAGIC"),
        (b'{"peft_type": ["LORA"]}', ConfigError, "peft_type"),
        (b'{"peft_type": "LORA", "r": 3000000}', ConfigError, "3000000"),
        (b'{"peft_type": "LORA", "r": 1e400}', ConfigError, "r: expected int, got inf"),
        (b'{"peft_type": "LORA", "r": null}', ConfigError, "r: expected an integer"),
    ],
)
def test_files_that_are_no_config(
    content: bytes, error: type[Exception], says: str, tmp_path: Path
) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    model = tiny.Plain()
    before = tiny.snapshot(model)
    with pytest.raises(error, match=says) as caught:
        fastadapt.PeftModel.from_pretrained(model, tmp_path)
    assert len(str(caught.value)) < 1000
    tiny.assert_same(model, before)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=CONFIG):
        PeftConfig.from_pretrained(tmp_path)


def test_fields_of_a_newer_peft_are_left_out_with_a_warning(tmp_path: Path) -> None:
    values = {"peft_type": "LORA", "r": 3, "lora_magic": True}
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with pytest.warns(FastAdaptWarning, match="lora_magic"):
        assert PeftConfig.from_pretrained(tmp_path).r == 3


def test_runtime_options_are_never_saved() -> None:
    config = fastadapt.LoraConfig()
    assert "runtime_config" not in json.loads(config.to_json())


@pytest.mark.parametrize(
    ("release", "commit", "written"),
    [
        ("0.17.0", "abc", "0.17.0"),
        ("0.17.0.dev3", "abc", "0.17.0.dev3@abc"),
        ("0.17.0.dev3", None, "0.17.0.dev3@UNKNOWN"),
    ],
)
def test_the_version_is_written_and_kept(
    release: str, commit: str | None, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadapt.config.__version__", release)
    monkeypatch.setattr("fastadapt.config._get_commit_hash", lambda _: commit)
    fastadapt.LoraConfig().save_pretrained(tmp_path)
    monkeypatch.undo()
    assert PeftConfig.from_pretrained(tmp_path).peft_version == written


def test_any_json_is_no_config(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"foo": "bar"}')
    with pytest.raises(TypeError, match=r"missing required keys: {'peft_type'}"):
        fastadapt.LoraConfig.from_pretrained(tmp_path)


def test_adaloras_r_is_not_used_and_says_so() -> None:
    with pytest.warns(FastAdaptWarning, match="`r` is not used in AdaLora"):
        fastadapt.AdaLoraConfig(r=10, total_step=1)


@pytest.mark.parametrize("peft_type", sorted(UNBUILT))
def test_configs_of_methods_that_are_not_built(peft_type: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    cls = config_of(peft_type)
    needed = {"CPT": {"task_type": "CAUSAL_LM"}, "XLORA": {"hidden_size": 8, "adapters": {}}}
    config = cls(**needed.get(peft_type, {}))
    theirs = getattr(peft, cls.__name__)(**needed.get(peft_type, {}))
    assert config.to_dict() == theirs.to_dict()
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert (type(again), again.to_dict()) == (cls, config.to_dict())
    assert again.is_prompt_learning == theirs.is_prompt_learning
    with pytest.raises(UnsupportedError, match=peft_type):
        fastadapt.get_peft_model(tiny.model(), config)


def test_clashes_in_the_configs_of_prompts() -> None:
    for values in ({}, {"tokenizer_name_or_path": "t"}):
        with pytest.raises(ConfigError, match="prompt_tuning_init='TEXT'"):
            fastadapt.PromptTuningConfig(prompt_tuning_init="TEXT", **values)
    with pytest.raises(ConfigError, match="only supports task_type"):
        fastadapt.CPTConfig()
    with pytest.raises(ConfigError, match="must be <= `num_virtual_tokens`"):
        fastadapt.CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=3)
    with pytest.raises(ConfigError, match="same length"):
        fastadapt.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1])
