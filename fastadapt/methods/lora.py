# SPDX-License-Identifier: Apache-2.0
"""LoRA:  W' = W + s B A,  s = alpha / r  (rsLoRA: alpha / sqrt(r)).

    A: (r, in, *kernel)  B: (out, r, ...)

Sources: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter, DeltaAdapter
from fastadapt.base import Base, compose
from fastadapt.combine import Recipe
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, UnsupportedError
from fastadapt.methods import lora_combine
from fastadapt.ops.low_rank_mixed import Pair
from fastadapt.targets import pattern_value

MAX_RANK = 1 << 16
"""No published adapter comes near; a config that asks for more is wrong or hostile."""


@dataclass
class LoraRuntimeConfig:
    """Options that are never saved."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(AdapterConfig):
    """PEFT's LoraConfig, every field.

    r: the rank, at least 1; lora_alpha: s = lora_alpha / r; lora_dropout: on the low-rank part's
    input, in [0, 1); bias: "none", "all" or "lora_only"; rank_pattern, alpha_pattern: pattern ->
    value; use_rslora: s = lora_alpha / sqrt(r); use_dora: see ``fastadapt.methods.dora``;
    lora_bias: B has a bias; init_lora_weights: True, False or "gaussian".
    Fields whose behaviour is not built yet raise UnsupportedError, by name, when they are used.
    """

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] | Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA  # type: ignore[attr-defined]
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        for rank in (self.r, *self.rank_pattern.values()):
            _check_rank(rank)
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or not abs(alpha) <= 1e6:
                raise ConfigError(f"lora_alpha: expected a finite number up to 1e6, got {alpha!r}")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: expected 0 <= p < 1, got {self.lora_dropout!r}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"bias: expected none, all or lora_only, got {self.bias!r}")
        if self.use_dora and self.lora_bias:
            raise ConfigError("lora_bias=True is not supported with use_dora=True, set one of them")

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("runtime_config")
        return values

    def at(self, path: str) -> LoraConfig:
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        r = pattern_value(self.rank_pattern, path, self.r)
        alpha = pattern_value(self.alpha_pattern, path, self.lora_alpha)
        return dataclasses.replace(self, r=r, lora_alpha=alpha)

    @property
    def scaling(self) -> float:
        """s."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def check_built(self) -> None:
        """Raise UnsupportedError for the first field whose behaviour is not built yet."""
        for name in _NOT_BUILT:
            if getattr(self, name):
                raise UnsupportedError(
                    f"LoraConfig.{name}={getattr(self, name)!r}: not built yet in fastadapt; leave "
                    "it at its default"
                )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise UnsupportedError(
                f"LoraConfig.init_lora_weights={self.init_lora_weights!r}: not built yet in "
                "fastadapt; use True, False or 'gaussian'"
            )


_NOT_BUILT = (
    "megatron_config", "trainable_token_indices", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "velora_config", "alora_invocation_tokens", "use_qalora",
    "monteclora_config", "layer_replication", "target_parameters", "use_bdlora", "arrow_config",
    "kasa_config", "ensure_weight_tying",
)  # fmt: skip


class Lora(DeltaAdapter):
    name, prefix, Config = "lora", "lora_", LoraConfig
    _prefix = "lora_"

    @classmethod
    def variant(cls, config: LoraConfig) -> type[Adapter]:
        config.check_built()
        if config.use_dora:
            from fastadapt.methods.dora import Dora

            return Dora
        return cls

    def build(self, base: Base, shared: Any) -> None:
        config: LoraConfig = self.config
        if base.indexed and config.lora_bias:
            raise UnsupportedError("lora_bias=True is not supported for an embedding")
        prefix = self._prefix = "lora_embedding_" if base.indexed else "lora_"
        a, b = base.pair(config.r, config.lora_bias)
        _initialise(a, b, config)
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

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B)."""
        return _tensor(self[self._prefix + "A"]), _tensor(self[self._prefix + "B"])

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


def _initialise(a: Any, b: Any, config: LoraConfig) -> None:
    """PEFT's start values, with the same draws from the generator."""
    if config.init_lora_weights is False:
        return
    if isinstance(a, nn.Parameter):
        nn.init.zeros_(a)
        nn.init.normal_(b)
        return
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(a.weight, std=1 / config.r)
    else:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    nn.init.zeros_(b.weight)
    if b.bias is not None:
        nn.init.zeros_(b.bias)


def _tensor(part: Any) -> Tensor:
    tensor: Tensor = part if isinstance(part, torch.Tensor) else part.weight
    return tensor


def _check_rank(rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ConfigError(f"r: expected an integer, got {rank!r}")
    if not 0 < rank <= MAX_RANK:
        raise ConfigError(
            f"`r` should be a positive integer value (at most {MAX_RANK}) but the value passed is "
            f"{rank}"
        )
