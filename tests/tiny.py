# SPDX-License-Identifier: Apache-2.0
"""Tiny Llama, GPT-2 and Bert made from configs (no download), dense or quantised by bitsandbytes.

Weights are wide and biases are not zero, so that a bias, a scale or a layer that is lost shows.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 96
HIDDEN = 64
FORMATS = ("fp32", "bf16", "nf4", "int8")
_KEPT = tempfile.TemporaryDirectory(prefix="fastadapt-tiny-")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For modules that import it: threads cost such small products four times what they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(kind: str = "llama", fmt: str = "fp32") -> Any:
    """A fresh model, the same weights each time.

    kind: llama, tied (Llama whose head is its embedding), gpt2, bert (two classes)
    fmt:  fp32, bf16, nf4 (double quantisation, bf16 compute), nf4-fp32 (fp32 compute), int8
    """
    if fmt == "fp32":
        return copy.deepcopy(_dense(kind))
    if fmt == "bf16":
        return copy.deepcopy(_dense(kind)).to(torch.bfloat16)
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    compute = torch.float32 if fmt == "nf4-fp32" else torch.bfloat16
    # the head of a classifier is trained whole, so it stays dense
    kept = ["classifier"] if kind == "bert" else None
    config = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
        if fmt == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute, llm_int8_skip_modules=kept,
        )
    )  # fmt: skip
    cls = AutoModelForSequenceClassification if kind == "bert" else _causal()
    made = cls.from_pretrained(folder(kind), quantization_config=config, dtype=compute)
    for layer in made.modules():
        # the form that bitsandbytes repacks into at evaluation (AVX-512) keeps bf16 scales
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return made.train()


@cache
def folder(kind: str) -> Path:
    """The dense model as files."""
    path = Path(_KEPT.name) / kind
    _dense(kind).save_pretrained(path)
    return path


class Plain(nn.Module):
    """Two blocks of two linears and a head, for what needs no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "o_proj": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.lm_head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block["o_proj"](block["q_proj"](x).tanh())
        return self.lm_head(x)  # type: ignore[no-any-return]


def batch(kind: str = "llama", rows: int = 2, length: int = 12, seed: int = 3) -> dict[str, Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    labels = torch.arange(rows) % 2 if kind == "bert" else ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def randomise(adapted: nn.Module, seed: int = 5, scale: float = 0.3) -> None:
    """Every adapter parameter gets values of its own, from its name, so that none is zero."""
    for name, parameter in adapter_parameters(adapted):
        generator = torch.Generator().manual_seed(seed + sum(name.encode()) * 7919)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "magnitude" in name:
            fresh = parameter.detach().double() * (1 + 0.1 * noise)
        else:
            fresh = noise * scale / (1 if parameter.dim() < 2 else parameter.shape[1] ** 0.5)
        parameter.data.copy_(fresh)


def adapter_parameters(adapted: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """LoRA's parameters (not trained copies, not biases of the base)."""
    return ((n, p) for n, p in adapted.named_parameters() if "lora_" in n)


def dequantised(quantised: Any, kind: str = "llama") -> Any:
    """The model that a quantised one stands for, in float64: the oracle."""
    from bitsandbytes.functional import dequantize_4bit

    plain = model(kind).double()
    layers = dict(quantised.named_modules())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            path, _, leaf = name.rpartition(".")
            source: Any = getattr(layers[path], leaf)
            if type(source).__name__ == "Params4bit":
                state = copy.copy(source.quant_state)
                state.dtype = torch.float32
                source = dequantize_4bit(source.data, state)
            elif type(source).__name__ == "Int8Params":
                source = source.data.double() * (source.SCB.double().view(-1, 1) / 127)
            turned = type(plain.get_submodule(path)).__name__ == "Conv1D" and leaf == "weight"
            parameter.copy_(source.t() if turned else source)
    return plain


def snapshot(module: nn.Module) -> dict[str, Any]:
    """All that a failed call must leave alone: class, tensors to the bit, trainability, keys."""
    return {
        "class": type(module),
        "attributes": set(module.__dict__),
        "classes": [(n, type(m)) for n, m in module.named_modules()],
        "tensors": {k: v.detach().clone() for k, v in tensors(module)},
        "trainable": [n for n, p in module.named_parameters() if p.requires_grad],
    }


def assert_same(module: nn.Module, before: dict[str, Any]) -> None:
    """``module`` is as it was when ``snapshot`` looked."""
    now = snapshot(module)
    for key in ("class", "attributes", "classes", "trainable"):
        assert now[key] == before[key], key
    assert list(now["tensors"]) == list(before["tensors"])
    for key, tensor in now["tensors"].items():
        assert tensor.dtype == before["tensors"][key].dtype, key
        assert torch.equal(tensor, before["tensors"][key]), key


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, in order."""
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _causal() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


@cache
def _dense(kind: str) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    if kind in ("llama", "tied"):
        made = tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=128,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=64, attention_bias=True, initializer_range=0.1,
                tie_word_embeddings=kind == "tied", pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        made = tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1,
                pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    else:
        made = tf.BertForSequenceClassification(
            tf.BertConfig(
                vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=128,
                num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
                pad_token_id=0, num_labels=2,
            )
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return made.train()
