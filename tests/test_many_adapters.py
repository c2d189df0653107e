# SPDX-License-Identifier: Apache-2.0
"""Many adapters on one base: switching, memory, compilation, mixed batches and generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadapt
from fastadapt.layer import AdaptedLayer
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

CONFIGS: dict[str, Any] = {
    "lora": lambda **f: fastadapt.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **f),
    "dora": lambda **f: fastadapt.LoraConfig(
        r=4, target_modules=["q_proj", "o_proj"], use_dora=True, **f
    ),
}


def many(method: str, count: int, *, scales: int = 1, **fields: Any) -> Any:
    """A plain model with adapters n0, n1, ..., of so many scales."""
    model = fastadapt.get_peft_model(tiny.Plain(), CONFIGS[method](**fields), "n0").eval()
    for i in range(1, count):
        model.add_adapter(f"n{i}", CONFIGS[method](lora_alpha=8 + i % scales, **fields))
    tiny.randomise(model)
    return model


def bytes_of(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_memory_is_the_sum_of_the_adapters() -> None:
    base = bytes_of(tiny.Plain())
    one, hundred = (bytes_of(many("lora", n)) - base for n in (1, 100))
    assert hundred == 100 * one


def test_switching_touches_the_two_adapters_alone(monkeypatch: Any) -> None:
    """So that it costs the same with 2 and with 100."""
    model = many("lora", 100)
    layers = sum(isinstance(m, AdaptedLayer) for m in model.modules())
    touched: list[str] = []
    plain = AdaptedLayer.parts_of
    monkeypatch.setattr(
        AdaptedLayer, "parts_of", lambda self, name: touched.append(name) or plain(self, name)
    )
    for name in ("n57", "n3"):
        touched.clear()
        model.set_adapter(name)
        assert len(touched) <= 4 * layers
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(f".{name}." in n for n in trained)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("scales", "frozen"), [(1, True), (1, False), (2, True)])
def test_one_compilation_serves_all_adapters_of_a_scale(
    method: str, scales: int, frozen: bool
) -> None:
    model = many(method, 6, scales=scales, inference_mode=frozen)
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for name in [*model.peft_config, "n0"]:
        model.set_adapter(name, inference_mode=frozen)
        results.append(fast(x))
        assert torch.equal(results[-1], model(x)), name
    assert len(compiled) == scales
    assert not torch.equal(results[0], results[1])


def test_a_scale_that_is_written_reaches_a_compiled_model() -> None:
    model = many("lora", 2)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    before = fast(x)
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer):
            layer.scaling["n0"] = 5.0
    assert not torch.equal(fast(x), before)
    assert torch.equal(fast(x), model(x))
    with fastadapt.helpers.rescale_adapter_scale(model, 0.0):
        # through the low-rank op all the same, which may add in another order
        torch.testing.assert_close(fast(x), tiny.Plain()(x))
    assert torch.equal(fast(x), model(x))


@contextmanager
def running(model: Any, name: str) -> Iterator[None]:
    if name == "__base__":
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(name)
        yield


def encoder_decoder() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=tiny.VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


MODELS: dict[str, Any] = {
    "decoder": (lambda: tiny.model("llama").eval(), ["q_proj", "down_proj"], "CAUSAL_LM"),
    "encoder-decoder": (encoder_decoder, ["q", "wo"], "SEQ_2_SEQ_LM"),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "two-of-three-beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_generation_gives_each_row_what_its_adapter_gives(kind: str, way: str) -> None:
    made, targets, task = MODELS[kind]
    base = made()
    model: Any = None
    for name in ("one", "two"):
        config = fastadapt.LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type=task)
        if model is None:
            model = fastadapt.get_peft_model(base, config, name).eval()
        else:
            model.add_adapter(name, config)
    tiny.randomise(model, scale=1.0)
    names = ["two", "__base__", "one", "two"]
    inputs = tiny.batch(rows=len(names), length=6)
    inputs.pop("labels")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **WAYS[way]}
    mixed = model.generate(**inputs, **options, adapter_names=names)
    per_row = options.get("num_return_sequences", 1)
    seen = []
    for i, name in enumerate(names):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        with running(model, name):
            alone: Tensor = model.generate(**row, **options)
        assert torch.equal(mixed[i * per_row : (i + 1) * per_row], alone), (i, name)
        seen.append(alone)
    assert not torch.equal(seen[0][:, -5:], seen[2][:, -5:])
