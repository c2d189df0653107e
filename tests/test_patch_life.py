# SPDX-License-Identifier: Apache-2.0
"""A PEFT model that ``patch`` speeds up beside its twin that is left alone: whatever is done to
both, their tensors are equal to the bit and their outputs and gradients within the error budget;
after ``unpatch`` nothing tells them apart."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastadapt
from fastadapt.errors import LifecycleError, UnsupportedError
from fastadapt.patch.peft import SpedUp
from tests import twins
from tests.tiny import one_thread  # noqa: F401

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.parity

NAMES = st.sampled_from(["default", "a", "b"])
KINDS = st.sampled_from([*twins.OPTIONS])
SERVED = (peft.tuners.lora.Linear,)


def twice(module: Any, args: Any, y: Tensor) -> Tensor:
    return 2 * y


class PatchLife(RuleBasedStateMachine):
    """``ours`` is patched and unpatched; ``theirs`` never is."""

    def __init__(self) -> None:
        super().__init__()
        made = peft.LoraConfig(**twins.config("plain"))
        self.theirs = peft.get_peft_model(twins.base(), made)
        twins.give_values(self.theirs, "default")
        self.ours = copy.deepcopy(self.theirs)
        self.folder = tempfile.TemporaryDirectory()
        self.hooks: list[Any] = []

    def teardown(self) -> None:
        self.folder.cleanup()

    def both(self, action: Any) -> list[Any]:
        """On ``ours`` and on ``theirs``; both raise the same or give something."""
        results = []
        for model in (self.ours, self.theirs):
            # a call that fails half way may leave fresh values behind
            torch.manual_seed(0)
            results.append(twins.outcome(action, model))
        (ours, error), (theirs, expected) = results
        assert error == expected, (error, expected)
        return [ours, theirs]

    @property
    def patched(self) -> bool:
        return any(isinstance(m, SpedUp) for m in self.ours.modules())

    # there and back

    @rule()
    def patch(self) -> None:
        served = [m for m in self.ours.modules() if isinstance(m, SERVED)]
        left = [m for m in served if not isinstance(m, SpedUp)]
        if left:
            assert fastadapt.patch(self.ours) is self.ours
            assert all(isinstance(m, SpedUp) for m in served)
        else:
            with pytest.raises((LifecycleError, UnsupportedError)):
                fastadapt.patch(self.ours)

    @precondition(lambda self: self.patched)
    @rule()
    def unpatch(self) -> None:
        fastadapt.unpatch(self.ours)
        assert twins.structure(self.ours) == twins.structure(self.theirs)

    # PEFT's life

    @rule(name=NAMES, kind=KINDS)
    def add(self, name: str, kind: str) -> None:
        fields = twins.config(kind)
        self.both(lambda m: m.add_adapter(name, peft.LoraConfig(**fields)))
        self.both(lambda m: twins.give_values(m, name))

    @rule(names=st.lists(NAMES, min_size=1, max_size=2, unique=True))
    def set(self, names: list[str]) -> None:
        self.both(lambda m: m.base_model.set_adapter(names if len(names) > 1 else names[0]))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if name in self.theirs.peft_config and len(self.theirs.peft_config) > 1:
            self.both(lambda m: m.delete_adapter(name))

    @rule(enabled=st.booleans())
    def switch(self, enabled: bool) -> None:
        self.both(lambda m: m.base_model.enable_adapter_layers() if enabled
                  else m.base_model.disable_adapter_layers())  # fmt: skip

    @rule(
        names=st.none() | st.lists(NAMES, min_size=1, max_size=2, unique=True), safe=st.booleans()
    )
    def merge(self, names: list[str] | None, safe: bool) -> None:
        self.both(lambda m: m.merge_adapter(adapter_names=names, safe_merge=safe))

    @rule()
    def unmerge(self) -> None:
        self.both(lambda m: m.unmerge_adapter())

    @rule(name=NAMES, trainable=st.booleans())
    def save_and_load(self, name: str, trainable: bool) -> None:
        """The same bytes, and back under a new name."""
        where = {id(m): Path(self.folder.name) / n
                 for m, n in ((self.ours, "ours"), (self.theirs, "theirs"))}  # fmt: skip
        _, error = twins.outcome(lambda m: m.save_pretrained(where[id(m)]), self.theirs)
        assert twins.outcome(lambda m: m.save_pretrained(where[id(m)]), self.ours)[1] == error
        if error is not None:
            return
        names = list(self.theirs.peft_config)
        inner = "" if names[0] == "default" else names[0]
        files = [(f / inner / "adapter_model.safetensors").read_bytes() for f in where.values()]
        assert files[0] == files[1]
        if name not in names:
            source = str(where[id(self.theirs)] / inner)
            self.both(lambda m: m.load_adapter(source, name, is_trainable=trainable) and None)

    @rule(training=st.booleans())
    def train(self, training: bool) -> None:
        self.both(lambda m: m.train(training))

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def copied(self, way: str) -> None:
        def twin(model: Any) -> Any:
            return copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))

        self.ours, self.theirs = self.both(twin)
        self.hooks = []

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    def to(self, dtype: torch.dtype) -> None:
        self.both(lambda m: m.to(dtype))

    @rule(part=st.sampled_from(["base_layer", "lora_A"]), layer=st.integers(0, 1))
    def hook(self, part: str, layer: int) -> None:
        """A hook of the user's that changes the output; taken off again by the next ``hook``."""

        def put_on(model: Any) -> Any:
            q = model.base_model.model.layers[layer]["q_proj"]
            at = getattr(q, part)
            at = at["default"] if part == "lora_A" else at
            return at.register_forward_hook(twice)

        for handle in self.hooks:
            handle.remove()
        self.hooks = [handle for handle in self.both(put_on) if handle is not None]

    @rule(name=NAMES, factor=st.sampled_from([0.5, 2.0]))
    def scale(self, name: str, factor: float) -> None:
        self.both(lambda m: [layer.set_scale(name, factor) for layer in m.modules()
                             if isinstance(layer, peft.tuners.lora.LoraLayer)])  # fmt: skip

    @rule(way=st.sampled_from(["checkpoint", "reentrant", "autocast", "no_grad"]))
    def another_call(self, way: str) -> None:
        def call(model: Any, x: Tensor) -> Tensor:
            if way == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    return model(x)  # type: ignore[no-any-return]
            if way == "no_grad":
                with torch.no_grad():
                    return model(x)  # type: ignore[no-any-return]
            x.requires_grad_(way == "reentrant")
            return checkpoint(model, x, use_reentrant=way == "reentrant")  # type: ignore[no-any-return]

        self.equal(call)

    @rule()
    def rows_of_their_own(self) -> None:
        names = [*self.theirs.peft_config][:2]
        rows = [*names, "__base__"] if len(names) == 2 else [*names, "__base__", names[0]]

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return model.eval()(  # type: ignore[no-any-return]
                    twins.inputs(next(model.parameters()).dtype), adapter_names=rows
                )

        training = self.theirs.training
        ours, theirs = self.both(call)
        self.both(lambda m: m.train(training))
        assert ours is theirs is None or torch.equal(ours, theirs)

    # at every step

    @invariant()
    def alike(self) -> None:
        twins.same_state(self.ours, self.theirs)
        assert [p.requires_grad for p in self.ours.parameters()] == [
            p.requires_grad for p in self.theirs.parameters()
        ]
        assert self.ours.active_adapters == self.theirs.active_adapters
        self.equal(None)

    def equal(self, call: Any) -> None:
        def step(model: Any) -> dict[str, Tensor]:
            return twins.run(model, call)

        ours, theirs = self.both(step)
        if theirs is not None:
            exact = copy.deepcopy(self.theirs).double()
            twins.assert_close(ours, theirs, twins.run(exact))


class CompiledLife(PatchLife):
    """Compiled calls, too, which take a second each."""

    @rule()
    def compiled_call(self) -> None:
        torch._dynamo.reset()
        self.equal(lambda model, x: torch.compile(model, backend="eager")(x))


def machine(life: Any, examples: int, steps: int) -> Any:
    found = type("Machine", (life,), {}).TestCase
    found.settings = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True,
        database=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return found


TestPatchLife = machine(PatchLife, 8, 25)
TestPatchLifeLong = pytest.mark.slow(machine(PatchLife, 60, 40))
TestPatchLifeCompiled = pytest.mark.slow(machine(CompiledLife, 4, 25))
