# SPDX-License-Identifier: Apache-2.0
"""LN tuning:  W' = V, bias' = c: a trained copy in the layer's place, meant for norms.

    V, c: the shapes of W and bias, start at them

The copy is a layer of the model's own class, so that norms with a form of their own (Gemma's 1 + V)
stay what they are; it keeps the layer's dtype.
Source: Tuning LayerNorm in Attention (arXiv 2312.11420).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType

_LLAMA = ["input_layernorm", "post_attention_layernorm", "norm"]
_GEMMA2 = [
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm", "norm",
]  # fmt: skip
_T5 = ["layer_norm", "final_layer_norm"]
_BLOOM = ["input_layernorm", "post_attention_layernorm", "ln_f"]


@dataclass
class LNTuningConfig(AdapterConfig):
    """PEFT's LNTuningConfig: nothing but targets."""

    without = ("layers_to_transform", "layers_pattern")
    default_targets = {  # noqa: RUF012
        "llama": _LLAMA, "mistral": _LLAMA, "gemma": _LLAMA, "gemma2": _GEMMA2,
        "gemma3_text": _GEMMA2, "bloom": _BLOOM, "falcon": _BLOOM, "t5": _T5, "mt5": _T5,
        "llava": ["multi_modal_projector", *_LLAMA, "embed_tokens", "lm_head"],
        "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
        "gpt2": ["ln_1", "ln_2", "ln_f"], "gptj": ["ln_1", "ln_f"],
        "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
        "phi": ["input_layernorm", "final_layernorm"],
        "qwen2": ["post_attention_layernorm"], "qwen3": ["post_attention_layernorm"],
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LN_TUNING  # type: ignore[attr-defined]


class LNTuning(Adapter):
    name, prefix, Config = "ln_tuning", "ln_tuning_", LNTuningConfig
    takes_norms = keeps_dtype = True

    def build(self, base: Base, shared: Any) -> None:
        self.parts = {"ln_tuning_layers": base.copy()}
        self._orient = base.orient

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        layer = self["ln_tuning_layers"]
        return self._orient(layer.weight), getattr(layer, "bias", None)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y: Tensor = self["ln_tuning_layers"](x)
        return y
