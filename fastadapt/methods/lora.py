# SPDX-License-Identifier: Apache-2.0
"""LoRA:  W' = W + s B A,  s = alpha / r  (rsLoRA: alpha / sqrt(r)).

    A: (r, in, *kernel)  B: (out, r, ...)

How A and B start is an ``Init``; what some fields make of the formula is a subclass in a file of
its own, which changes the pair (``pair``) or the path of x through it (``forward``).
Sources: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter, DeltaAdapter
from fastadapt.base import Base, compose
from fastadapt.combine import Recipe
from fastadapt.errors import ConfigError, FastAdaptWarning, UnsupportedError
from fastadapt.inits import init_of
from fastadapt.inits.init import Init
from fastadapt.methods import lora_combine
from fastadapt.methods.lora_config import MAX_RANK, LoraConfig, LoraRuntimeConfig
from fastadapt.methods.trainable_tokens import Companions, TokenAdapter, companions_of
from fastadapt.ops.low_rank_mixed import Pair

__all__ = ["MAX_RANK", "Lora", "LoraConfig", "LoraRuntimeConfig"]


class Lora(DeltaAdapter):
    name, prefix, Config = "lora", "lora_", LoraConfig
    _prefix = "lora_"
    _init: Init | None = None

    @classmethod
    def variant(cls, config: LoraConfig) -> type[Adapter]:
        config.check_built()
        return config.variant() or cls

    @classmethod
    def check_beside(cls, config: Any, others: dict[str, Any]) -> None:
        super().check_beside(config, others)
        own = set(config.target_parameters or ())
        for name, other in others.items():
            theirs = set(other.target_parameters or ())
            if own and theirs and own != theirs:
                raise ConfigError(
                    "When using multiple adapters with `target_parameters`, all adapters must "
                    f"target the same set of parameters, but got {sorted(own)} for the new adapter "
                    f"and {sorted(theirs)} for adapter '{name}'."
                )
        starts = [str(c.init_lora_weights).lower() for c in (config, *others.values())]
        for start, shown in (("pissa", "PiSSA"), ("corda", "CorDA"), ("olora", "OLoRA")):
            if others and start in starts:
                warnings.warn(
                    f"{shown} changes the base weights of the model and should thus not be used "
                    f"with other adapters. Save the {shown} adapter as a plain LoRA, with "
                    "path_initial_model_for_weight_conversion, and load that.",
                    FastAdaptWarning,
                    stacklevel=5,
                )

    @classmethod
    def tied(cls, config: LoraConfig, base: Base, source: Adapter) -> Adapter:
        from fastadapt.methods.lora_tied import TiedLora

        return TiedLora(config, base, source)

    @classmethod
    def inside(cls, config: LoraConfig) -> tuple[type[Adapter], type[Adapter]]:
        from fastadapt.methods.lora_stack import LoraInside, LoraOutput

        return LoraInside, LoraOutput

    @classmethod
    def of_parameter(cls, config: LoraConfig) -> type[Adapter]:
        from fastadapt.methods.lora_stack import LoraStack

        return LoraStack

    @classmethod
    def companions(cls, config: LoraConfig, model: Any, adapters: dict[str, Any]) -> Companions:
        if not config.trainable_token_indices:
            return {}
        return companions_of(model, config, TokenAdapter)

    def build(self, base: Base, shared: Any) -> None:
        config: LoraConfig = self.config
        if base.indexed and config.lora_bias:
            raise UnsupportedError("lora_bias=True is not supported for Embedding.")
        prefix = self._prefix = "lora_embedding_" if base.indexed else "lora_"
        a, b = base.pair(config.r, config.lora_bias)
        init = init_of(config.init_lora_weights)
        if base.indexed and not init.indexed and config.init_lora_weights is not False:
            init = init_of(True)
        self._init = init
        init.fill(tensor_of(a), tensor_of(b), base, config)
        self.changes_base = init.changes_base
        if config.lora_bias and config.init_lora_weights:
            nn.init.zeros_(b.bias)  # type: ignore[arg-type, union-attr]
        if init.frozen:
            self.frozen = tuple(prefix + part for part in init.frozen)
        p = config.lora_dropout
        self.parts = {
            "lora_dropout": nn.Dropout(p) if p > 0 else nn.Identity(), prefix + "A": a,
            prefix + "B": b,
        }  # fmt: skip
        self.values = {
            "r": config.r, "lora_alpha": config.lora_alpha, "scaling": config.scaling,
            "use_rslora": config.use_rslora, "use_dora": config.use_dora,
            "lora_bias": config.lora_bias,
        }  # fmt: skip

    def start(self, base: Base) -> None:
        if self._init is None or not self.changes_base:
            return
        if self._init.iterations is not None and self.config.inference_mode:
            warnings.warn(
                f"init_lora_weights={self.config.init_lora_weights!r} starts at random: the base "
                "that it leaves is not the one that the loaded adapter was trained on; save with "
                "path_initial_model_for_weight_conversion instead",
                FastAdaptWarning,
                stacklevel=5,
            )
        with torch.no_grad():
            w = base.read()[0].float()
            a, b = (tensor_of(self[self._prefix + part]) for part in "AB")
            base.store(self._init.residual(w, a, b, self.config))
        self._init.started(base)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B)."""
        return tensor_of(self[self._prefix + "A"]), tensor_of(self[self._prefix + "B"])

    def delta(self) -> Tensor:
        scale: float = self["scaling"]
        a, b = self.pair()
        if b.shape[1] != a.shape[0]:
            raise UnsupportedError(
                "LoRA on a convolution with groups cannot be merged: its A sees every input "
                "channel, so that B A is not a weight of the layer's shape"
            )
        return compose(a, b) * scale

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w, bias = super().merged(w, bias)
        extra = self._bias()
        if extra is None:
            return w, bias
        return w, extra if bias is None else bias + extra

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base.low_rank(x, *self.pair(), self["scaling"], self.rate("lora_dropout"))
        extra = self._bias()
        return y if extra is None else y + base.channels(extra).to(y.dtype)

    def low_rank_pair(self) -> Pair | None:
        if type(self).forward is not Lora.forward or self["lora_bias"]:
            return None
        return Pair(*self.pair(), self["scaling"], self.rate("lora_dropout"))

    @classmethod
    def combined_config(cls, configs: list[Any], recipe: Recipe) -> Any:
        return lora_combine.combined_config(configs, recipe)

    def combine(self, sources: list[tuple[Adapter, float]], recipe: Recipe, base: Base) -> None:
        lora_combine.combine(self, sources, recipe, base)

    def _bias(self) -> Tensor | None:
        if not self["lora_bias"]:
            return None
        bias: Tensor = self["lora_B"].bias * self["scaling"]
        return bias


def tensor_of(part: Any) -> Tensor:
    """The matrix of A or B, which an embedding has as a bare parameter."""
    tensor: Tensor = part if isinstance(part, torch.Tensor) else part.weight
    return tensor


def refuse_kind(base: Base, field: str, *, indexed: bool = True) -> None:
    """For variants over a matrix: no convolution, and no embedding unless ``indexed``."""
    if len(base.shape) != 2 or base.groups != 1 or (base.indexed and not indexed):
        kind = "an embedding" if base.indexed else "a convolution"
        raise UnsupportedError(f"{field} is not supported on {kind}: it is about a matrix product")
