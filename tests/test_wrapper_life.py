# SPDX-License-Identifier: Apache-2.0
"""``get_peft_model`` beside PEFT's: the same steps on both, and on PEFT's in float64, give the same
outputs, gradients, trainable parameters, active adapters and errors."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

import fastadapt
from tests import twins
from tests.tiny import one_thread  # noqa: F401

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.parity

NAMES = st.sampled_from(["default", "a", "b"])
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "LoraConfig": {k: twins.config(k) for k in twins.OPTIONS if k not in ("dropout", "saved")},
    "IA3Config": {
        "plain": {"target_modules": ["q_proj"], "feedforward_modules": []},
        "wide": {"target_modules": ["q_proj", "o_proj"], "feedforward_modules": ["o_proj"]},
    },
    "LoHaConfig": {
        "plain": {"r": 2, "target_modules": ["q_proj"]},
        "elsewhere": {"r": 3, "alpha": 2, "target_modules": ["o_proj"]},
    },
    "HRAConfig": {
        "plain": {"r": 2, "target_modules": ["q_proj"]},
        "wide": {"r": 4, "target_modules": ["q_proj", "o_proj"]},
    },
}
"""The configs of each method, by name; none trains a module whole, since a deletion in PEFT makes
the next adapter active without its copy of such a module."""


class WrapperLife(RuleBasedStateMachine):
    """Three models: ours, PEFT's, and PEFT's in float64, the measure of both."""

    @initialize(method=st.sampled_from([*METHODS]))
    def start(self, method: str) -> None:
        self.method = method
        fields = METHODS[method]["plain"]
        self.ours = fastadapt.get_peft_model(twins.base(), getattr(fastadapt, method)(**fields))
        self.theirs = peft.get_peft_model(twins.base(), getattr(peft, method)(**fields))
        self.exact = peft.get_peft_model(twins.base().double(), getattr(peft, method)(**fields))
        self.folder = Path(tempfile.mkdtemp())
        self.all(lambda m: twins.give_values(m, "default"))

    def all(self, action: Any) -> list[Any]:
        """On each model; ours raises where PEFT's does."""
        results = [twins.outcome(action, m) for m in (self.ours, self.theirs, self.exact)]
        errors = [error for _, error in results]
        assert (errors[0] is None) == (errors[1] is None), errors
        if errors[1] is not None and errors[0] is not None:
            # KeyError and AttributeError of PEFT's are accidents
            accidents = (KeyError, AttributeError)
            assert issubclass(errors[0], errors[1]) or errors[1] in accidents, errors
        return [value for value, _ in results]

    def config(self, model: Any, kind: str) -> Any:
        home = fastadapt if model is self.ours else peft
        return getattr(home, self.method)(**METHODS[self.method][kind])

    @rule(name=NAMES, data=st.data())
    def add(self, name: str, data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from([*METHODS[self.method]]))
        before = set(self.theirs.peft_config)
        self.all(lambda m: m.add_adapter(name, self.config(m, kind)))
        if name not in before:
            self.all(lambda m: twins.give_values(m, name))

    @rule(names=st.lists(NAMES, min_size=1, max_size=2, unique=True))
    def set(self, names: list[str]) -> None:
        if set(names) <= set(self.theirs.peft_config):
            self.all(lambda m: m.base_model.set_adapter(names if len(names) > 1 else names[0]))

    @rule(name=NAMES)
    def set_by_the_wrapper(self, name: str) -> None:
        self.all(lambda m: m.set_adapter(name))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        # (a layer without another adapter makes PEFT's model say that none is active, while the
        # next one acts in the layers that have it)
        alone = any(list(m.lora_A) == [name] for m in self.theirs.modules() if hasattr(m, "lora_A"))
        if len(self.theirs.peft_config) > 1 and not alone:
            self.all(lambda m: m.delete_adapter(name))

    @rule(enabled=st.booleans())
    def switch(self, enabled: bool) -> None:
        self.all(lambda m: m.base_model.enable_adapter_layers() if enabled
                 else m.base_model.disable_adapter_layers())  # fmt: skip

    @rule()
    def inside_disable(self) -> None:
        def call(model: Any) -> Tensor:
            with model.disable_adapter():
                return twins.run(model)["output"]

        ours, theirs, exact = ({"output": y} for y in self.all(call))
        twins.assert_close(ours, theirs, exact)

    @rule(
        names=st.none() | st.lists(NAMES, min_size=1, max_size=2, unique=True), safe=st.booleans()
    )
    def merge(self, names: list[str] | None, safe: bool) -> None:
        self.all(lambda m: m.merge_adapter(adapter_names=names, safe_merge=safe))

    @rule()
    def unmerge(self) -> None:
        self.all(lambda m: m.unmerge_adapter())

    @rule(name=NAMES, source=st.sampled_from(["own", "other"]), trainable=st.booleans())
    def save_and_load(self, name: str, source: str, trainable: bool) -> None:
        """Each loads its own file, or ours PEFT's and PEFT's ours."""
        where = {id(m): self.folder / n for m, n in (
            (self.ours, "ours"), (self.theirs, "theirs"), (self.exact, "exact"))}  # fmt: skip
        self.all(lambda m: m.save_pretrained(where[id(m)]) and None)
        first = next(iter(self.theirs.peft_config))
        inner = "" if first == "default" else first
        if name in self.theirs.peft_config or not (self.folder / "ours").exists():
            return
        other = {id(self.ours): self.theirs, id(self.theirs): self.ours, id(self.exact): self.exact}

        def load(model: Any) -> None:
            folder = where[id(other[id(model)] if source == "other" else model)]
            model.load_adapter(str(folder / inner), name, is_trainable=trainable)

        self.all(load)

    @rule(training=st.booleans())
    def train(self, training: bool) -> None:
        self.all(lambda m: m.train(training) and None)

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def copied(self, way: str) -> None:
        def twin(model: Any) -> Any:
            return copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))

        self.ours, self.theirs, self.exact = self.all(twin)

    @invariant()
    def alike(self) -> None:
        assert self.ours.active_adapters == self.theirs.active_adapters
        assert list(self.ours.peft_config) == list(self.theirs.peft_config)
        active = self.theirs.active_adapters
        assert merged(self.ours) == merged(self.theirs)
        if not any(getattr(m, "disable_adapters", False) for m in self.theirs.modules()):
            assert trainable(self.ours, active) == trainable(self.theirs, active)
        ours, theirs, exact = self.all(twins.run)
        if theirs is not None:
            # unmerging by PEFT leaves a rounding for each adapter in the weight
            twins.assert_close(ours, theirs, exact, steps=32)

    def teardown(self) -> None:
        if hasattr(self, "ours"):
            plain = [m.unload() for m in (self.ours, self.theirs)]
            assert [type(m) for m in plain[0].modules()] == [type(m) for m in plain[1].modules()]


def trainable(model: nn.Module, active: list[str]) -> set[str]:
    """Of the active adapters: leaving ``disable_adapter`` freezes the others in PEFT alone."""
    return {n for n, p in model.named_parameters()
            if p.requires_grad and not set(active).isdisjoint(n.split("."))}  # fmt: skip


def merged(model: nn.Module) -> list[list[str]]:
    return [list(m.merged_adapters) for m in model.modules() if hasattr(m, "merged_adapters")]


def machine(examples: int, steps: int) -> Any:
    found = type("Machine", (WrapperLife,), {}).TestCase
    found.settings = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True,
        database=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return found


TestWrapperLife = machine(8, 20)
TestWrapperLifeLong = pytest.mark.slow(machine(60, 30))
