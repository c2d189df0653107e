# SPDX-License-Identifier: Apache-2.0
"""``nn.MultiheadAttention`` with adapters: both of its projections, which it multiplies itself.

The wrapper adapts ``in_proj_weight``; ``out_proj`` becomes an adapted layer whose own forward
nobody calls. While the module runs it sees W' in the place of both weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastadapt.base import FrozenLayer
from fastadapt.errors import (
    ConfigError,
    FastAdaptWarning,
    LifecycleError,
    ModuleTypeError,
    UnsupportedError,
)
from fastadapt.kinds import Attention
from fastadapt.layer import AdaptedLayer
from fastadapt.parameter import AdaptedParameter, FrozenParameter, Place, holding, innermost

IN, OUT = "in_proj_weight", "base_layer.out_proj"
_OWN = ("embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim",
        "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn",
        "merge_masks")  # fmt: skip


class AdaptedAttention(AdaptedParameter):
    """The attention at ``base_layer``; attributes that it has are the attention's own."""

    def __init__(self, base_layer: nn.Module, parameter_name: str = IN) -> None:
        super().__init__(base_layer, parameter_name)

    def _freeze(self, base_layer: nn.Module) -> FrozenLayer:
        return frozen(base_layer)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False while the stored weights are not the ones to run: nn.TransformerEncoderLayer would
        take them past the forward otherwise."""
        return self._disabled != self.merged or not (self.merged or self._running)

    @property
    def out_proj(self) -> Any:
        return innermost(self.base_layer.out_proj)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is not None or self.rows is not None:
            raise ModuleTypeError("lora.MultiheadAttention does not support mixed adapter batches.")
        out: Any = self.base_layer.out_proj
        if self._disabled:
            # nobody calls out_proj, which would do it itself
            for layer in (self, out):
                if layer.merged:
                    layer.unmerge()
        if self._disabled or self.merged or not self._running:
            return self.base_layer(*args, **kwargs)
        if out.merged:
            raise LifecycleError(
                "The out_proj layer of MultiheadAttention has merged layers but MultiheadAttention "
                "itself doesn't; please ensure that either both or none have merged layers"
            )
        w = self._under(self._running, (), None).read()[0]
        v = out.stack(out.active_adapters).read()[0]
        with (
            holding(self.base_layer, IN, w.to(self.frozen.dtype)),
            holding(out.base_layer, "weight", v.to(out.frozen.dtype)),
        ):
            return self.base_layer(*args, **kwargs)

    def _restore_weights(self) -> None:
        """PEFT's name; the weights are never away here."""

    def _get_name(self) -> str:
        return "lora.MultiheadAttention"

    def extra_repr(self) -> str:
        return ""

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:
            return getattr(super().__getattr__("base_layer"), name)
        return super().__getattr__(name)


def frozen(module: nn.Module) -> FrozenParameter:
    """The base that is ``in_proj_weight``. Raises for attention that has none."""
    held = innermost(module)
    if not getattr(held, "_qkv_same_embed_dim", True):
        raise ConfigError(
            "Only same embed for query/key/value is supported as of now for MultiheadAttention."
        )
    made = FrozenParameter(held, IN)
    made.kind = Attention(held, IN)
    return made


def plan(method: Any, config: Any, path: str, module: nn.Module) -> dict[str, Any]:
    """The two adapters of the attention at ``path``, by path."""
    refuse(config)
    inner, outer = method.inside(config)
    out = getattr(innermost(module), "out_proj", None)
    base = out.frozen if isinstance(out, AdaptedLayer) else None
    if base is None:
        if not isinstance(out, nn.Linear):
            raise ModuleTypeError(
                "out_proj must be an instance of nn.Linear for MultiheadAttention, got "
                f"{type(out).__name__}."
            )
        base = FrozenLayer(out)
        # PEFT makes this pair twice and keeps the second: the same draws from the generator
        outer(config, base)
    own = module.frozen if isinstance(module, AdaptedLayer) else frozen(module)
    return {path: inner(config, own), f"{path}.{OUT}": outer(config, base)}


def place(path: str, module: nn.Module) -> Place:
    """Where the adapter of ``in_proj_weight`` goes."""
    return Place(path, path, IN, module if isinstance(module, AdaptedAttention) else None)


def refuse(config: Any) -> None:
    """Raise UnsupportedError for what is not defined on merged weights."""
    asked = [n for n in ("use_dora", "velora_config", "kasa_config", "alora_invocation_tokens",
                         "use_qalora", "use_bdlora", "monteclora_config", "lora_bias")
             if getattr(config, n, None)]  # fmt: skip
    if asked:
        raise UnsupportedError(
            f"MultiheadAttention does not support {asked[0]} (yet), please set {asked[0]} to its "
            "default"
        )
    if getattr(config, "lora_dropout", 0):
        warnings.warn(
            "lora_dropout has no effect on MultiheadAttention, which multiplies by merged weights",
            FastAdaptWarning,
            stacklevel=5,
        )
