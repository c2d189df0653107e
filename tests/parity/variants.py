# SPDX-License-Identifier: Apache-2.0
"""An adapted model of PEFT and one of ours, from the same seed, with the float64 oracle of both."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny

peft = pytest.importorskip("peft")

ALL = {"target_modules": "all-linear"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default-targets": ("llama", {}),
    "names": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama", {**ALL, "task_type": "CAUSAL_LM"}),
    "regex": ("llama", {"target_modules": r".*\.(q|down)_proj"}),
    "rslora": ("llama", {**ALL, "use_rslora": True}),
    "dora": ("llama", {**ALL, "use_dora": True}),
    "gaussian": ("llama", {**ALL, "init_lora_weights": "gaussian"}),
    "random-init": ("llama", {**ALL, "init_lora_weights": False}),
    "rank-pattern": (
        "llama", {**ALL, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}},
    ),
    "alpha-pattern": (
        "llama", {**ALL, "alpha_pattern": {"q_proj": 32, "^model.layers.0.*down_proj": 5}},
    ),
    "bias-all": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias-lora-only": ("llama", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "modules-to-save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "suffix-to-save": (
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    ),
    "both-targeted-and-saved": (
        "llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ),
    "lora-bias": ("llama", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "layer-zero": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "exclude-names": ("llama", {**ALL, "exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]}),
    "exclude-regex": (
        "llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0.*"},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-regex": ("llama", {"target_modules": r".*(embed_tokens|q_proj)"}),
    "embedding-and-head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding-dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "tied": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-default": ("gpt2", {}),
    "gpt2-dora": ("gpt2", {**ALL, "use_dora": True}),
    "gpt2-embedding": ("gpt2", {"target_modules": ["wte", "c_fc"], "bias": "all"}),
    "bert": ("bert", {"task_type": "SEQ_CLS"}),
    "bert-headless": ("bert", {"target_modules": ["query", "dense"]}),
    "bert-bias": ("bert", {**ALL, "task_type": "SEQ_CLS", "bias": "all", "use_dora": True}),
    "bert-embedding": (
        "bert",
        {"task_type": "SEQ_CLS", "bias": "lora_only",
         "target_modules": ["word_embeddings", "query", "dense"]},
    ),
}  # fmt: skip
"""Name -> (model, fields of the LoraConfig)."""

HALF = ("all-linear", "dora", "lora-bias", "suffix-to-save", "embedding-dora", "gpt2", "bert-bias")
"""The variants that are run on bf16, NF4 and int8 bases, too."""

CASES = [
    pytest.param(name, fmt, id=f"{name}-{fmt}")
    for fmt in tiny.FORMATS
    for name in (VARIANTS if fmt == "fp32" else HALF)
]


def adapted(library: Any, name: str, fmt: str = "fp32", base: Any = None) -> Any:
    """The variant made by ``library`` (peft or fastadapt), always from the same seed."""
    kind, options = VARIANTS[name]
    base = tiny.model(kind, fmt) if base is None else base
    config = library.LoraConfig(r=4, lora_alpha=8, **copy.deepcopy(options))
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(base, config)


def oracle(name: str, fmt: str) -> Any:
    """PEFT's model over the float64 weights that the base stands for."""
    kind = VARIANTS[name][0]
    base = tiny.model(kind, fmt)
    exact = base.double() if fmt in ("fp32", "bf16") else tiny.dequantised(base, kind)
    return adapted(peft, name, base=exact)


def share(source: Any, *others: Any) -> None:
    """Other values than at the start, the same in every model; ``source`` says what trains."""
    given = dict(source.named_parameters())
    tiny.randomise(source)
    with torch.no_grad():
        for key, parameter in given.items():
            if parameter.requires_grad and "lora_" not in key:
                noise = torch.Generator().manual_seed(len(key))
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
        for other in others:
            for key, parameter in other.named_parameters():
                if given[key].requires_grad:
                    parameter.copy_(given[key])


def outputs(model: Any, kind: str) -> Tensor:
    """Logits in evaluation."""
    inputs = tiny.batch(kind)
    inputs.pop("labels")
    with torch.no_grad():
        return model.eval()(**inputs).logits  # type: ignore[no-any-return]
