# SPDX-License-Identifier: Apache-2.0
"""(IA)3:  W' = diag(l) W, bias' = l bias;  for feed-forward modules  W' = W diag(l).

    l: one for each output channel, or for each input channel of a feed-forward module; starts at 1

Held in PEFT's shapes: (out, 1), feed-forward (1, in); on convolutions (1, channels, 1, ...).
Source: T-Few (arXiv 2205.05638).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.combine import Recipe
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, TargetError
from fastadapt.ops.scale import scale
from fastadapt.targets import full_match

if TYPE_CHECKING:
    from fastadapt.layer import AdaptedLayer

_TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "t5": (["k", "v", "wo"], ["wo"]),
    "mt5": (["k", "v", "wi_1"], []),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])),
    "bloom": (["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    **dict.fromkeys(("bert", "roberta"), (["key", "value", "output.dense"], ["output.dense"])),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    "gptj": (["q_proj", "v_proj", "fc_out"], ["fc_out"]),
    **dict.fromkeys(
        ("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"),
        (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    ),
    "gpt_neo": (["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    **dict.fromkeys(("bart", "phi"), (["q_proj", "v_proj", "fc2"], ["fc2"])),
    **dict.fromkeys(("llama", "mistral"), (["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    **dict.fromkeys(
        ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    ),
    "mixtral": (["k_proj", "v_proj", "w2"], ["w2"]),
    "deberta-v2": (["key_proj", "value_proj", "output.dense"], ["output.dense"]),
    "deberta": (["in_proj", "output.dense"], ["output.dense"]),
}
"""Model type -> (target modules, those of them that are feed-forward)."""


@dataclass
class IA3Config(AdapterConfig):
    """PEFT's IA3Config.

    feedforward_modules: among the targets, those whose input is scaled; names (plain suffixes) or
    a pattern; None is the default of the model's type; init_ia3_weights: l starts at 1, else at
    random. ``fan_in_fan_out`` has no effect: layers know how they store W.
    """

    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    without = ("layers_to_transform", "layers_pattern")
    repeats_targets = True
    default_targets = {k: names for k, (names, _) in _TARGETS.items()}  # noqa: RUF012
    feedforward = False
    """Here, on this layer: set by ``at``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3  # type: ignore[attr-defined]
        names = self.feedforward_modules
        if isinstance(names, list | tuple | set | frozenset):
            names = self.feedforward_modules = set(names)
            if isinstance(self.target_modules, set) and not all(
                any(t.endswith(n) for t in self.target_modules) for n in names
            ):
                raise ConfigError("`feedforward_modules` should be a subset of `target_modules`")
        elif names is not None and not isinstance(names, str):
            raise ConfigError(f"feedforward_modules: expected names or a pattern, got {names!r}")

    def for_model(self, model_type: str | None) -> IA3Config:
        if self.feedforward_modules is not None:
            return self
        if model_type not in _TARGETS:
            raise TargetError(
                "Please specify `feedforward_modules` in `peft_config`: there is no default for "
                f"the model type {model_type!r}; [] is none"
            )
        # not by ``replace``: the defaults need not be a subset of the targets that were asked for
        made = copy.copy(self)
        made.feedforward_modules = set(_TARGETS[model_type][1])
        return made

    def at(self, path: str) -> IA3Config:
        names = self.feedforward_modules or ()
        made = copy.copy(self)
        if isinstance(names, str):
            made.feedforward = full_match(names, path)
        else:
            made.feedforward = path.endswith(tuple(names))
        return made


class IA3(Adapter):
    name, prefix, Config = "ia3", "ia3_", IA3Config

    def build(self, base: Base, shared: Any) -> None:
        config: IA3Config = self.config
        out, inner, *kernel = base.shape
        count = inner * base.groups if config.feedforward else out
        shape = (count, 1) if not kernel and not config.feedforward else (1, count)
        vector = nn.Parameter(torch.randn(*shape, *[1] * len(kernel)))
        if config.init_ia3_weights:
            nn.init.ones_(vector)
        self.identity_at_init = config.init_ia3_weights  # type: ignore[misc]
        self.parts = {"ia3_l": vector}
        self.feedforward: bool = config.feedforward

    def attach(self, layer: AdaptedLayer, key: str) -> None:
        super().attach(layer, key)
        # PEFT's name, one for all adapters of a layer
        layer.is_feedforward = self.feedforward

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        vector: Tensor = self["ia3_l"].flatten()
        w = w.to(torch.promote_types(w.dtype, vector.dtype))
        if not self.feedforward:
            scaled = w * vector.view(-1, *[1] * (w.dim() - 1))
            return scaled, None if bias is None else bias * vector
        # with groups, each group of outputs has the scales of its own inputs
        groups = vector.numel() // w.shape[1]
        rows = vector.view(groups, w.shape[1]).repeat_interleave(w.shape[0] // groups, 0)
        return w * rows.view(*rows.shape, *[1] * (w.dim() - 2)), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        vector: Tensor = self["ia3_l"].flatten()
        if not self.feedforward:
            y = base(x)
            return scale(y, vector, axis=y.dim() + 1 - len(base.shape))
        if base.indexed:
            y = base(x)
            return (y * vector[x].unsqueeze(-1)).to(y.dtype)
        return base(scale(x, vector, axis=x.dim() + 1 - len(base.shape)))

    @classmethod
    def combined_config(cls, configs: list[Any], recipe: Recipe) -> Any:
        kinds = {type(c.feedforward_modules) for c in configs}
        if len(kinds) > 1:
            raise ConfigError(
                "all adapter configs should follow the same feedforward modules type, got "
                f"{sorted(k.__name__ for k in kinds)}"
            )
        made = copy.copy(configs[0])
        if kinds == {str}:
            made.feedforward_modules = "|".join(f"({c.feedforward_modules})" for c in configs)
        else:
            made.feedforward_modules = {m for c in configs for m in c.feedforward_modules or ()}
        made.target_modules = None
        return made

    def combine(self, sources: list[tuple[Adapter, float]], recipe: Recipe, base: Base) -> None:
        with torch.no_grad():
            tensors, weights = [s["ia3_l"] for s, _ in sources], [w for _, w in sources]
            self["ia3_l"].copy_(recipe.total(tensors, weights))
