# SPDX-License-Identifier: Apache-2.0
"""explain is complete (every module with parameters, once) and true (what it says runs, runs)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastadapt
from fastadapt.errors import KernelError
from fastadapt.layer import AdaptedLayer
from fastadapt.ops import low_rank_native
from fastadapt.ops.dispatch import IMPLEMENTATIONS
from fastadapt.ops.low_rank import low_rank_fwd
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

REASONS = (
    None, "triton: ", "native: ", "the adapters are disabled", "the adapters are merged",
    "the adapters are not active", "a embedding layer is not a matrix product",
    "the layer's forward was replaced", "the layer has forward hooks", "the base weight is trained",
    "bnb8: the layer quantises its input",
)  # fmt: skip
"""All that a LoRA layer can be told, by beginning."""


def config(**fields: Any) -> fastadapt.LoraConfig:
    return fastadapt.LoraConfig(r=4, **{"target_modules": ["q_proj"], **fields})


def records(model: Any) -> dict[str, dict[str, Any]]:
    found = fastadapt.explain(model).records
    assert len({r["module"] for r in found}) == len(found)
    return {r["module"]: r for r in found}


def holders(model: nn.Module) -> dict[str, int]:
    """Path -> number of parameters, of every module that holds some, as in a plain model."""
    return {n: sum(p.numel() for p in m.parameters(recurse=False))
            for n, m in model.named_modules() if list(m.parameters(recurse=False))}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "bert"])
@pytest.mark.parametrize("fmt", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("door", [fastadapt.patch, fastadapt.get_peft_model])
def test_every_module_with_parameters_has_one_record(door: Any, kind: str, fmt: str) -> None:
    plain = holders(tiny.model(kind, fmt))
    before = records(tiny.model(kind, fmt))
    assert before.keys() == plain.keys()
    assert all(r["implementation"] is None and not r["adapters"] for r in before.values())
    task = "SEQ_CLS" if kind == "bert" else None
    embedding = {"llama": "embed_tokens", "tied": "embed_tokens", "gpt2": "wte"}.get(kind)
    wanted = ["c_attn"] if kind == "gpt2" else ["query"] if kind == "bert" else ["q_proj"]
    wanted += [embedding] if embedding else []
    model = door(tiny.model(kind, fmt), config(target_modules=wanted, task_type=task))
    after = records(model)
    assert after.keys() == plain.keys()
    assert {n for n, r in after.items() if r["implementation"]} == {
        n for n in plain if n.rpartition(".")[2] in wanted
    }
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(r["trainable"] for r in after.values()) == trained


def test_parameters_of_the_model_itself() -> None:
    model = tiny.Plain()
    model.scale = nn.Parameter(torch.ones(3))
    found = records(fastadapt.patch(model, config()))
    assert found[""]["parameters"] == 3
    assert found.keys() == holders(fastadapt.unpatch(model)).keys()


STATES = {
    "plain": lambda m: None,
    "disabled": lambda m: m.disable_adapter_layers(),
    "merged": lambda m: m.merge_adapter(),
    "not-active": lambda m: (m.add_adapter("other", config(target_modules=["o_proj"])),
                             m.set_adapter("other")),
    "hooks": lambda m: [layer.base_layer.register_forward_hook(lambda *_: None)
                        for layer in layers(m)],
    "replaced": lambda m: [setattr(layer.base_layer, "forward", layer.base_layer.forward)
                           for layer in layers(m)],
    "trained": lambda m: [layer.base_layer.weight.requires_grad_() for layer in layers(m)],
    "two-active": lambda m: (m.add_adapter("other", config()),
                             m.set_adapter(["default", "other"])),
}  # fmt: skip


def layers(model: Any) -> list[AdaptedLayer]:
    return [m for m in model.modules() if isinstance(m, AdaptedLayer)]


def watch(monkeypatch: pytest.MonkeyPatch, seen: Callable[[bool], object]) -> None:
    """Tell ``seen`` of every forward call, by the op or straight to the extension: whether it is
    over a base's bits."""
    by_op, straight = low_rank_fwd.call, low_rank_native.one_call
    monkeypatch.setattr(low_rank_fwd, "call", lambda *a: seen(a[9] is not None) or by_op(*a))
    monkeypatch.setattr(
        low_rank_native, "one_call", lambda *a: seen(a[7] is not None) or straight(*a)
    )


@pytest.mark.parametrize("fmt", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_it_says_is_what_runs(
    fmt: str, state: str, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer is watched: a fused op over the base's bits is called where the record says so,
    and the base layer itself where it says that."""
    if state == "trained" and fmt != "fp32":
        pytest.skip("integers have no gradient")
    wanted = ["q_proj", "embed_tokens"] if not dora else ["q_proj"]
    model = fastadapt.patch(tiny.model(fmt=fmt), config(target_modules=wanted, use_dora=dora))
    STATES[state](model)
    said = records(model)
    paths = {id(m): n for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    fused: set[str] = set()
    entered: list[str] = []
    watch(monkeypatch, lambda over_bits: over_bits and fused.add(entered[-1]))
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda m, _: entered.append(paths[id(m)]))
    model(**tiny.batch())
    assert set(entered) == set(paths.values())
    for path in paths.values():
        runs, reason = said[path]["implementation"], said[path]["reason"]
        assert (path in fused) == (runs in IMPLEMENTATIONS), (path, runs, reason)
        assert any(reason is None if r is None else str(reason).startswith(r) for r in REASONS)
    coverage = fastadapt.explain(model).coverage
    assert (coverage > 0) == bool(fused)


@pytest.mark.parametrize(
    "method", ["LORA", "IA3", "VERA", "LOHA", "OFT", "HRA", "SHIRA", "LN_TUNING"]
)
def test_methods_without_a_fused_path_say_so(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.config import from_dict
    from fastadapt.methods import METHODS

    if method not in METHODS:
        pytest.skip(f"{method} is not built yet")
    given = {"peft_type": method, "target_modules": ["q_proj"]}
    model = fastadapt.patch(tiny.model(), from_dict(given))
    over_bits: list[bool] = []
    watch(monkeypatch, over_bits.append)
    said = {r["implementation"] for r in fastadapt.explain(model).records if r["adapters"]}
    assert not any(over_bits), "explain runs no layer"
    model(**tiny.batch())
    assert any(over_bits) == bool(said & set(IMPLEMENTATIONS))


def test_it_changes_nothing() -> None:
    model = fastadapt.patch(tiny.model(), config(lora_dropout=0.5)).train()
    before, state = tiny.snapshot(model), torch.get_rng_state()
    fastadapt.explain(model)
    tiny.assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_forcing_an_implementation_shows() -> None:
    model = fastadapt.patch(tiny.model(), config())
    with fastadapt.use("reference"):
        found = fastadapt.explain(model)
    assert found.implementations() == {"reference": 2}


def test_a_contract() -> None:
    model = fastadapt.patch(tiny.model(), config())
    assert fastadapt.explain(model, require=1.0).coverage == 1.0
    model = fastadapt.patch(tiny.model(fmt="int8"), config())
    assert fastadapt.explain(model, require=0.0).coverage == 0.0
    with pytest.raises(KernelError, match=r"expected 50%.*got 0%.*q_proj: bnb8"):
        fastadapt.explain(model, require=0.5)


def test_a_contract_names_every_layer_that_breaks_it() -> None:
    """Together by reason, each layer once; layers that keep it are not named."""
    wanted = ["q_proj", "o_proj", "embed_tokens"]
    model = fastadapt.patch(tiny.model(), config(target_modules=wanted))
    for layer in model.model.layers:
        layer.self_attn.o_proj.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(KernelError) as caught:
        fastadapt.explain(model, require=1.0)
    said = str(caught.value)
    for i in range(2):
        assert said.count(f"layers.{i}.self_attn.o_proj") == 1
    assert said.count("embed_tokens") == said.count("the layer has forward hooks") == 1
    assert "q_proj" not in said


def test_only_active_adapters_count() -> None:
    """2 r (in + out) of each that runs; one of two that is fused is half of the layer."""
    model = fastadapt.patch(tiny.model(), config())
    one = fastadapt.explain(model).records
    model.add_adapter("other", config())
    assert fastadapt.explain(model).records[1]["flops"] == one[1]["flops"]
    model.set_adapter(["default", "other"])
    both = [r for r in fastadapt.explain(model).records if r["flops"]]
    assert {r["flops"] for r in both} == {2 * 2 * 4 * (tiny.HIDDEN + tiny.HIDDEN)}
    model.add_adapter("scale", fastadapt.IA3Config(target_modules=["q_proj"],
                                                   feedforward_modules=[]))  # fmt: skip
    model.set_adapter(["default", "scale"])
    mixed = fastadapt.explain(model)
    held = next(r for r in mixed.records if r["flops"])
    assert held["fused"] == 2 * 4 * (tiny.HIDDEN + tiny.HIDDEN)
    assert held["flops"] == held["fused"] + 2 * tiny.HIDDEN
    assert mixed.coverage == held["fused"] / held["flops"]
    assert held["reason"].startswith("ia3: ")


def test_every_reason_is_in_the_documentation() -> None:
    text = (Path(__file__).parent.parent / "docs" / "why-not-faster.md").read_text()
    assert [r for r in REASONS if r is not None and r not in text] == []


def test_flops_and_json() -> None:
    """2 r (in + out) a token and adapter."""
    model = fastadapt.patch(tiny.model(), config())
    found = fastadapt.explain(model, tokens=7)
    flops = {r["flops"] for r in found.records if r["adapters"]}
    assert flops == {2 * 4 * (tiny.HIDDEN + tiny.HIDDEN)}
    values = json.loads(found.to_json())
    assert values["tokens"] == 7
    assert values["records"] == found.records
    assert "q_proj" in str(found)


def test_modules_that_are_trained_whole() -> None:
    model = fastadapt.patch(tiny.model(), config(modules_to_save=["lm_head"]))
    record = records(model)["lm_head"]
    assert record["adapters"] == {"default": "modules_to_save"}
    assert record["implementation"] is None
    assert record["trainable"] == tiny.VOCABULARY * tiny.HIDDEN
