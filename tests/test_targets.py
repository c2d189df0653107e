# SPDX-License-Identifier: Apache-2.0
"""Which modules a configuration selects: PEFT's rules, and an error that helps for what fails."""

from __future__ import annotations

import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastadapt
from fastadapt import targets
from fastadapt.errors import FastAdaptWarning, TargetError
from fastadapt.targets import pattern_value
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

DOORS = [fastadapt.patch, fastadapt.get_peft_model]
HANGS_PEFT = "(([a-z_.0-9])+)+!"
"""Takes `re` exponential time; `regex` sees that no name has a "!"."""
SLOW = r"(\w|\w\w|\w\w\w|\.|\w\.)+[!?]"
"""Takes exponential time in any backtracking engine."""

PATHS = [
    "model.embed_tokens", "model.layers", "model.layers.0", "model.layers.0.q_proj",
    "model.layers.0.mlp.up_proj", "model.layers.1.q_proj", "model.layers.1.experts.3.up_proj",
    "model.layers.10.q_proj", "encoder.h.2.attn.c_attn", "blocks.0.q_proj", "lm_head", "q_proj",
    "my_q_proj", "visual.layers.1.q_proj",
]  # fmt: skip
NAMES = ["q_proj", "up_proj", "lm_head", "layers.1.q_proj", "model.layers.0.q_proj", "layers.0",
         "proj", "experts.3.up_proj", "c_attn", "embed_tokens"]  # fmt: skip
PATTERNS = [r".*q_proj", r".*\.layers\.[01]\..*", r"lm_head|.*up_proj", r"model\..*", "q_proj"]


@pytest.mark.parity
@settings(max_examples=200, deadline=None)
@given(
    wanted=st.one_of(st.lists(st.sampled_from(NAMES), min_size=1), st.sampled_from(PATTERNS)),
    excluded=st.one_of(
        st.none(), st.lists(st.sampled_from(NAMES), max_size=2), st.sampled_from(PATTERNS)
    ),
    saved=st.one_of(st.none(), st.lists(st.sampled_from(NAMES), max_size=2)),
    layers=st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 10), max_size=3)),
    pattern=st.sampled_from([None, "layers", "h", ["layers", "blocks"], []]),
)
def test_selection_is_pefts(
    wanted: Any, excluded: Any, saved: Any, layers: Any, pattern: Any
) -> None:
    """Over names, patterns, exclusions, trained modules and layer indices."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    fields = {"target_modules": wanted, "exclude_modules": excluded, "modules_to_save": saved}
    if not isinstance(wanted, str):
        fields["layers_to_transform"] = layers
        fields["layers_pattern"] = pattern if layers is not None else None
    theirs, ours = peft.LoraConfig(**fields), fastadapt.LoraConfig(**fields)
    expected = [p for p in PATHS if check_target_module_exists(theirs, p)]
    assert targets.select(ours, PATHS) == expected


@pytest.mark.parity
def test_default_targets_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert dict(theirs) == targets.DEFAULT_TARGETS


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["q_prj"], "did you mean 'q_proj'"),
        ([], "not found"),
        ("q_proj", "not found"),
        (r".*\.Q_PROJ", "not found"),
        ("(", "not a regular expression"),
        (HANGS_PEFT, "not found"),
        (SLOW, "too long"),
    ],
)
def test_nothing_matches(door: Any, wanted: Any, says: str) -> None:
    model = tiny.model()
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match=says), three_seconds():
        door(model, fastadapt.LoraConfig(target_modules=wanted))
    tiny.assert_same(model, before)


@pytest.mark.parametrize(
    "fields",
    [
        {"exclude_modules": SLOW}, {"modules_to_save": [SLOW]}, {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4}}, {"layers_to_transform": [0], "layers_pattern": SLOW},
        {"rank_pattern": {"(": 4}}, {"layers_to_transform": [0], "layers_pattern": "("},
        {"layers_to_transform": [7]}, {"exclude_modules": ["q_proj"]},
        {"modules_to_save": ["lm_hed"]},
    ],
    ids=lambda fields: "-".join(fields),
)  # fmt: skip
def test_every_pattern_is_bounded_and_checked(fields: dict[str, Any]) -> None:
    model = tiny.model()
    before = tiny.snapshot(model)
    with pytest.raises(TargetError), three_seconds():
        fastadapt.patch(model, fastadapt.LoraConfig(target_modules=["q_proj"], **fields))
    tiny.assert_same(model, before)


def test_one_of_several_names_without_a_match() -> None:
    config = fastadapt.LoraConfig(target_modules=["q_proj", "v_prj"])
    model = tiny.model()
    before = tiny.snapshot(model)
    with pytest.raises(TargetError, match=r"'v_prj'.*did you mean 'v_proj'.*allow_unmatched=True"):
        fastadapt.patch(model, config)
    tiny.assert_same(model, before)
    with pytest.warns(FastAdaptWarning, match=r"'v_prj'.*did you mean 'v_proj'"):
        fastadapt.patch(model, config, allow_unmatched=True)
    with pytest.warns(FastAdaptWarning, match=r"'v_prj'.*did you mean 'v_proj'"):
        made = fastadapt.get_peft_model(tiny.model(), config)
    assert len(dict(made.named_parameters())) > len(before["tensors"])


def test_all_names_that_match_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadapt.patch(tiny.model(), fastadapt.LoraConfig(target_modules=["q_proj", "v_proj"]))


def test_default_of_an_unknown_model() -> None:
    model = tiny.Plain()
    with pytest.raises(TargetError, match="specify `target_modules`"):
        fastadapt.patch(model, fastadapt.LoraConfig())


def test_all_linear_leaves_the_head() -> None:
    model = fastadapt.patch(tiny.model(), fastadapt.LoraConfig(target_modules="all-linear"))
    adapted = {n for n, m in model.named_modules() if hasattr(m, "adapter_layer_names")}
    linear = {n for n, m in tiny.model().named_modules() if isinstance(m, nn.Linear)}
    assert adapted == linear - {"lm_head"}


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.LayerNorm(8), "LayerNorm"), (nn.GRU(8, 8), "GRU"), (nn.Tanh(), "Tanh")],
)
@pytest.mark.parametrize("door", DOORS)
def test_a_target_of_a_kind_without_support(door: Any, layer: nn.Module, name: str) -> None:
    model = tiny.Plain()
    model.extra = layer
    before = tiny.snapshot(model)
    with pytest.raises(fastadapt.UnsupportedError, match=rf"extra.*{name}"):
        door(model, fastadapt.LoraConfig(target_modules=["q_proj", "extra"]))
    tiny.assert_same(model, before)


def test_long_lists_become_short_in_the_file() -> None:
    """As in PEFT: a config says q_proj, not the path of every q_proj."""
    model = nn.ModuleDict({"layers": nn.ModuleList(tiny.Plain() for _ in range(12))})
    names = [n for n, m in model.named_modules() if n.endswith("q_proj")]
    config = fastadapt.LoraConfig(target_modules=names)
    made = fastadapt.patch(model, config)
    assert made.peft_config["default"].target_modules == {"q_proj"}
    count = sum(hasattr(m, "adapter_layer_names") for m in made.modules())
    assert count == len(names) == 24


def test_the_callers_config_is_left_alone() -> None:
    config = fastadapt.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    before = config.to_dict()
    fastadapt.patch(tiny.model("bert"), config)
    assert config.to_dict() == before


@contextmanager
def three_seconds() -> Iterator[None]:
    """Fails after three seconds of processor time: a hang is no answer."""

    def stop(*_: Any) -> None:
        raise AssertionError("more than three seconds of processor time")

    old = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 3)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)


def test_rank_of_a_pattern_is_the_first_that_matches() -> None:
    config = fastadapt.LoraConfig(
        target_modules=["q_proj", "o_proj"], r=4,
        rank_pattern={r"layers\.0\..*": 2, "q_proj": 3}, alpha_pattern={"o_proj": 12},
    )  # fmt: skip
    model = fastadapt.patch(tiny.Plain(), config)
    ranks = {n: m.r["default"] for n, m in model.named_modules() if hasattr(m, "scaling")}
    assert ranks == {
        "layers.0.q_proj": 2, "layers.0.o_proj": 2, "layers.1.q_proj": 3, "layers.1.o_proj": 4,
    }  # fmt: skip
    assert model.layers[1]["o_proj"].scaling["default"] == 12 / 4
    assert isinstance(model.layers[0]["q_proj"].lora_A["default"].weight, torch.Tensor)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": r".*fc.*", "exclude_modules": r".*"}, "All modules were excluded"),
        ({"target_modules": ["fc1"], "exclude_modules": ["fc1"]}, "No modules were targeted"),
        ({"target_modules": ["absent"], "modules_to_save": ["fc1"]}, "No modules were targeted"),
        ({"target_modules": ["absent"]}, "not found in the base model"),
    ],
)
def test_the_error_says_what_took_the_targets_away(fields: Any, said: str) -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(3, 5), "fc2": nn.Linear(5, 3)})
    with pytest.raises(TargetError, match=said):
        fastadapt.get_peft_model(model, fastadapt.LoraConfig(**fields))


def test_an_exclusion_in_vain_warns_and_targets_are_told_once_in_their_order() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(3, 5), "fc2": nn.Linear(5, 3)})
    config = fastadapt.LoraConfig(target_modules=["fc2"], exclude_modules=["absent"])
    with pytest.warns(UserWarning, match="no modules were excluded"):
        made = fastadapt.get_peft_model(model, config)
    made.add_adapter("other", fastadapt.LoraConfig(target_modules=["fc1", "fc2"]))
    assert made.targeted_module_names == ["fc2", "fc1"]


def test_long_target_lists_of_ia3_keep_their_feedforward_modules(tmp_path: Any) -> None:
    """Shortened targets would no longer hold the names that feedforward_modules repeats."""

    def model() -> nn.Module:
        return nn.ModuleDict({f"b{i}": nn.ModuleDict({"up": nn.Linear(3, 3)}) for i in range(21)})

    names = [f"b{i}.up" for i in range(21)]
    config = fastadapt.IA3Config(target_modules=names, feedforward_modules=names)
    fastadapt.get_peft_model(model(), config).save_pretrained(tmp_path)
    loaded = fastadapt.PeftModel.from_pretrained(model(), tmp_path)
    assert loaded.targeted_module_names == names


def test_osf_without_targets_adapts_all_linear_layers_of_any_model() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(3, 5), "norm": nn.LayerNorm(5)})
    made = fastadapt.get_peft_model(model, fastadapt.OSFConfig())
    assert made.targeted_module_names == ["fc1"]


NAME = st.sampled_from(["a", "b", "ab", "a_b", "10", "1"])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    keys=st.lists(
        st.lists(NAME, min_size=1, max_size=3).map(".".join)
        | st.sampled_from([r"a\.b", ".*b", "(a|b)", "a$", r"\d+"]),
        max_size=6, unique=True,
    ),
    path=st.lists(NAME, min_size=1, max_size=4).map(".".join),
)  # fmt: skip
def test_the_first_pattern_that_matches_the_end_of_a_path(keys: list[str], path: str) -> None:
    """As PEFT looks them up, one expression after the other."""
    patterns = {key: i for i, key in enumerate(keys)}
    want = next((i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", path)), -1)
    assert pattern_value(patterns, path, -1) == want
