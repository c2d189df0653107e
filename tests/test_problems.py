# SPDX-License-Identifier: Apache-2.0
"""Of every method's configuration: what cannot be is said before any memory is taken, all at once
and with near misses."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from torch import nn

import fastadapt
from fastadapt.errors import ConfigError, TargetError
from fastadapt.methods import METHODS, UNBUILT, config_of
from fastadapt.testing import METHOD_CASES
from tests import tiny
from tests.test_targets import SLOW, three_seconds
from tests.tiny import one_thread  # noqa: F401

CASES = {fields["peft_type"]: fields for _, fields in reversed(METHOD_CASES.items())}
"""peft_type -> fields of its first case."""
every_class = pytest.mark.parametrize("peft_type", sorted({*METHODS, *UNBUILT}))
every_method = pytest.mark.parametrize("peft_type", sorted(METHODS))
RANKS = ("r", "init_r", "u", "n_frequency", "num_vectors", "effective_rank", "block_size")


def made(peft_type: str, **changes: Any) -> Any:
    fields = {**CASES.get(peft_type, {}), **changes}
    fields.pop("peft_type", None)
    if peft_type == "CPT":
        fields["task_type"] = "CAUSAL_LM"
    cls = config_of(peft_type)
    if "target_modules" not in {f.name for f in dataclasses.fields(cls)}:
        fields.pop("target_modules", None)
    return cls(**fields)


@every_class
def test_an_unknown_field_is_refused_with_the_nearest(peft_type: str) -> None:
    with pytest.raises(ConfigError, match=r"has no field 'task_typ': did you mean 'task_type'\?"):
        made(peft_type, task_typ="CAUSAL_LM")
    with pytest.raises(TypeError, match="has no field 'zzzz'"):
        made(peft_type, zzzz=1)


@every_class
def test_every_problem_is_in_one_error(peft_type: str) -> None:
    wrong = {"inference_mode": "no", "revision": 3, "task_typ": 1}
    with pytest.raises(ConfigError) as caught:
        made(peft_type, **wrong)
    text = str(caught.value)
    assert "has 3 problems:" in text
    for name in wrong:
        assert text.count(f"{name}") == 1 or name == "task_typ", text


@every_method
def test_ranks_and_sizes_are_at_least_one(peft_type: str) -> None:
    names = {f.name: f for f in dataclasses.fields(config_of(peft_type))}
    for name in RANKS:
        # AdaLoRA does not use r; OFT's r = 0 is its default, beside a block size
        if name not in names or (peft_type, name) == ("ADALORA", "r"):
            continue
        for value in (0, -1, -(1 << 40)):
            if value == 0 and names[name].default in (0, None):
                continue
            with pytest.raises(ConfigError, match=name):
                made(peft_type, **{name: value})


def test_problems_of_several_checks_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        fastadapt.LoraConfig(
            r=0, lora_alpha="x", lora_dropout=1.5, bias="some", use_dora=True, use_qalora=True,
            layers_pattern="h", init_lora_weights="magic",
        )  # fmt: skip
    text = str(caught.value)
    for part in ("`r` should", "lora_alpha: ", "lora_dropout: ", "use_dora and use_qalora",
                 "When `layers_pattern`", "magic"):  # fmt: skip
        assert text.count(part) == 1, part


@every_method
def test_targets_that_are_not_there(peft_type: str) -> None:
    model = tiny.Plain()
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match=r"'q_prj' \(did you mean 'q_proj'\?\)"):
        fastadapt.get_peft_model(model, made(peft_type, target_modules=["q_prj"]))
    tiny.assert_same(model, before)


@pytest.mark.parametrize(
    "peft_type",
    [
        # each waits for the limit of a second
        pytest.param(name, marks=[] if name in ("LORA", "IA3") else [pytest.mark.slow])
        for name in sorted(METHODS)
    ],
)
def test_a_pattern_that_takes_exponential_time(peft_type: str) -> None:
    model = tiny.Plain()
    model.add_module("a_name_that_is_long_enough_for_any_engine", nn.Linear(8, 8))
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match="too long"), three_seconds():
        fastadapt.get_peft_model(model, made(peft_type, target_modules=SLOW))
    tiny.assert_same(model, before)


@every_class
def test_configurations_are_copied_and_pickled(peft_type: str) -> None:
    config = made(peft_type)
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), copy.copy(config)):
        assert again == config
