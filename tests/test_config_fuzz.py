# SPDX-License-Identifier: Apache-2.0
"""Any adapter_config.json, valid field by field or not: the load gives the adapter that the file
says, which saves and loads again as the same, or raises one error of ours and leaves the model
alone. FUZZ_INPUTS=100000 (``make fuzz``) for a long run."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import tempfile
import warnings
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import fastadapt
from fastadapt.errors import FastAdaptError
from fastadapt.methods import METHODS, config_of
from tests import tiny

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXAMPLES = max(150, int(os.environ.get("FUZZ_INPUTS", "2000")) // 10)
NAMES = ("q_proj", "o_proj", "lm_head", "layers", "0", "all-linear", "nothing", r".*\.q_proj", "")
LEAST: dict[str, dict[str, Any]] = {"IA3": {"feedforward_modules": []}}
"""Fields that a method asks for."""

TEXT = st.sampled_from(NAMES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def of_hint(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field of this annotation may have."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return st.one_of([of_hint(h) for h in inner])
    if kind in (list, set, tuple):
        return st.lists(of_hint(inner[0]) if inner else TEXT, max_size=3)
    if kind is dict:
        return st.dictionaries(TEXT, of_hint(inner[1]) if inner else JSON, max_size=3)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.sampled_from([0, 1, 2, 4, 8, 16, 1000]),
        float: st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0]),
        str: TEXT,
    }
    return simple.get(kind, JSON)


@cache
def saved(method: str) -> tuple[bytes, dict[str, Any]]:
    """(tensors, config) of a good adapter."""
    fields = {"target_modules": ["q_proj"], **LEAST.get(method, {})}
    torch.manual_seed(0)
    model = fastadapt.get_peft_model(tiny.Plain(), config_of(method)(**fields))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = (Path(folder) / TENSORS).read_bytes()
        return tensors, json.loads((Path(folder) / CONFIG).read_text())


@cache
def savable() -> list[str]:
    """The methods that adapt a linear layer of a plain module."""
    found = []
    for name in METHODS:
        try:
            saved(name)
        except FastAdaptError:
            continue
        found.append(name)
    return found


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """(method, values): up to three fields valid by their annotation, up to one that is not."""
    method = draw(st.sampled_from(savable()))
    cls = config_of(method)
    values = dict(saved(method)[1])
    hints = get_type_hints(cls)
    known = sorted({f.name for f in dataclasses.fields(cls)} & set(values))
    for name in draw(st.lists(st.sampled_from(known), max_size=3, unique=True)):
        values[name] = draw(of_hint(hints[name]))
    for name in draw(st.lists(st.sampled_from([*known, "a_field_of_tomorrow"]), max_size=1)):
        values[name] = draw(JSON)
    return method, values


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(given=configs())
def test_a_config_is_what_it_says_or_one_error(given: tuple[str, dict[str, Any]]) -> None:
    method, values = given
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as where, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(where)
        (folder / TENSORS).write_bytes(saved(method)[0])
        (folder / CONFIG).write_text(json.dumps(values))
        plain = tiny.Plain()
        untouched = tiny.snapshot(plain)
        try:
            model = fastadapt.PeftModel.from_pretrained(plain, folder)
        except FastAdaptError:
            tiny.assert_same(plain, untouched)
        else:
            says_the_file(model, folder, values)
    # the file's tensors are a few KB: units are KiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def says_the_file(model: Any, folder: Path, values: dict[str, Any]) -> None:
    """The tensors of the file are in the model, and what it saves gives what it gives."""
    held = fastadapt.get_peft_model_state_dict(model)
    for key, tensor in load_file(folder / TENSORS).items():
        assert torch.equal(held[key], tensor), key
    assert str(model.peft_config["default"].peft_type.value) == values["peft_type"]
    model.save_pretrained(folder / "again")
    again = fastadapt.PeftModel.from_pretrained(tiny.Plain(), folder / "again")
    assert torch.equal(output(again), output(model))


def output(model: nn.Module) -> Tensor:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(x)  # type: ignore[no-any-return]
