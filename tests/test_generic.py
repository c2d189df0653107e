# SPDX-License-Identifier: Apache-2.0
"""What holds on a model for every method, found by its file: mixed batches, several at once,
copies, checkpointing, dtypes, parameters without memory, compiling."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadapt
from fastadapt import testing
from fastadapt.config import from_dict
from fastadapt.errors import FastAdaptWarning, UnsupportedError
from fastadapt.layer import AdaptedLayer
from fastadapt.testing import METHOD_CASES, UNMERGEABLE, adapter_parameters, move
from tests.tiny import one_thread  # noqa: F401

WIDE = 16
LEADING = {fields["peft_type"]: case for case, fields in reversed(METHOD_CASES.items())}
each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in LEADING.values() else [pytest.mark.slow])
        for case in METHOD_CASES
    ],
)
"""One case a method; with `make test-slow` all."""


class Net(nn.Module):
    """Two adapted layers and one that is not, a block of which can be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDE, 64)
        self.blocks = nn.ModuleList(nn.ModuleDict({"layer": nn.Linear(64, 64)}) for _ in range(2))
        self.checkpoint: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.checkpoint(self.block, block, x) if self.checkpoint else self.block(block, x)
        return x

    @staticmethod
    def block(block: Any, x: Tensor) -> Tensor:
        y: Tensor = x + block["layer"](x.tanh())
        return y


def config_of(case: str) -> Any:
    fields = dict(METHOD_CASES[case])
    if case == "bdlora":
        fields["use_bdlora"] = {"target_modules_bd_b": ["layer"], "nblocks": 2}
    return from_dict(fields)


def adapted(case: str, *others: str, dtype: Any = torch.float32, **options: Any) -> Any:
    """Net under the methods of these cases, "default" and "a1", .., moved from their starts."""
    torch.manual_seed(1)
    model = fastadapt.get_peft_model(Net().to(dtype), config_of(case), **options)
    for i, other in enumerate(others, 1):
        model.add_adapter(f"a{i}", config_of(other))
    moved(model)
    return model.eval()


def moved(model: Any) -> None:
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    flags = [(p, p.requires_grad) for layer in layers for _, p in adapter_parameters(layer)]
    for seed, layer in enumerate(layers):
        for name in layer.adapters:
            layer.set_requires_grad(name, True)
        move(layer, seed)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def given(rows: int = 5, dtype: Any = torch.float32) -> Tensor:
    return torch.randn(rows, 3, WIDE, generator=torch.Generator().manual_seed(2)).to(dtype)


def gradients(model: Any, x: Tensor, **more: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    model(x, **more).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def near(got: Tensor, want: Tensor, what: str = "") -> None:
    """Equal up to the order of fp32 sums: 64 products a value, twice over."""
    testing.check(
        got, want, want.double(), cost=1e-5 * max(1.0, want.abs().max().item()), what=what
    )


@each_case
def test_rows_of_a_batch_take_their_own_adapters(case: str) -> None:
    """Each row is what its adapter alone gives; with the method twice, and LoRA."""
    # a model trains one AdaLoRA at most
    second = "lora" if case == "adalora" else case
    model, x = adapted(case, second, "lora"), given()
    names = ["a1", "__base__", "default", "a2", "a1"]
    # Lily weighs its experts by a mean over the batch, so that rows are not independent
    together = {"a1": [[0, 4]]} if case == "lily" else {"a1": [[0], [4]]}
    groups = {**together, "__base__": [[1]], "default": [[2]], "a2": [[3]]}
    with torch.no_grad():
        got = model(x, adapter_names=names)
        for name, rows in groups.items():
            for row in rows:
                if name == "__base__":
                    with model.disable_adapter():
                        want = model(x[row])
                else:
                    model.set_adapter(name)
                    want = model(x[row])
                near(got[row], want, name)


@each_case
def test_several_at_once_are_their_merge(case: str) -> None:
    model, x = adapted(case, "lora"), given()
    model.base_model.set_adapter(["default", "a1"])
    with torch.no_grad():
        both = model(x)
        if any((case, kind) in UNMERGEABLE for kind in ("linear",)):
            with pytest.raises(UnsupportedError, match="cannot be merged"):
                model.merge_adapter()
            assert torch.equal(model(x), both)
            return
        model.merge_adapter()
        near(model(x), both)
        model.unmerge_adapter()
        assert torch.equal(model(x), both)


@each_case
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointing_keeps_gradients(case: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = adapted(case), given().requires_grad_()
    want = gradients(model, x)
    again = adapted(case)
    again.base_model.model.checkpoint = partial(checkpoint, use_reentrant=reentrant)
    got = gradients(again, x)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        near(got[name], grad, name)


@each_case
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_share_nothing(case: str, how: str) -> None:
    model, x = adapted(case, "lora"), given()
    with torch.no_grad():
        before = model(x)
        made = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(made(x), before)
        for name, parameter in made.named_parameters():
            if "layer." in name and parameter.is_floating_point():
                parameter.zero_()
        assert torch.equal(model(x), before)
        made.set_adapter("a1")
        made(x)


@each_case
@pytest.mark.parametrize("widen", [True, False])
def test_a_half_precision_base_has_wide_adapters(case: str, widen: bool) -> None:
    """float32 by default; in the base's dtype, with a warning, where that is asked for."""
    made = partial(adapted, case, dtype=torch.bfloat16, autocast_adapter_dtype=widen)
    if widen:
        model = made()
    else:
        with pytest.warns(FastAdaptWarning, match="small updates are rounded away"):
            model = made()
    trained = [p for p in model.parameters() if p.requires_grad]
    layer = next(m for m in model.modules() if isinstance(m, AdaptedLayer))
    wide = widen and not layer.adapters["default"].keeps_dtype
    assert {p.dtype for p in trained} == {torch.float32 if wide else torch.bfloat16}
    y = model(given().bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@each_case
def test_parameters_without_memory_are_filled_from_a_file(case: str, tmp_path: Any) -> None:
    model, x = adapted(case), given()
    model.save_pretrained(tmp_path)
    again = fastadapt.PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    with torch.no_grad():
        near(again(x), model(x))


@pytest.mark.parametrize(
    "case",
    [
        # two seconds each
        pytest.param(c, marks=[] if c in ("lora", "ia3", "oft") else [pytest.mark.slow])
        for c in METHOD_CASES
    ],
)
def test_a_compiled_model_is_the_same(case: str) -> None:
    """Through Dynamo; whether the graph is whole is not said."""
    model, x = adapted(case), given()
    with torch.no_grad():
        want = model(x)
        torch._dynamo.reset()
        got = torch.compile(model, backend="eager")(x)
    torch._dynamo.reset()
    near(got, want)
