# SPDX-License-Identifier: Apache-2.0
"""LoraConfig: PEFT's, every field, and what of it goes together."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, FastAdaptWarning, FieldError, UnsupportedError
from fastadapt.inits import init_of
from fastadapt.methods.fields import rate
from fastadapt.problems import note, noting
from fastadapt.targets import pattern_value

MAX_RANK = 1 << 16
"""No published adapter comes near; a config that asks for more is wrong or hostile."""

SUBCONFIGS = {
    "velora_config": "methods.velora:VeloraConfig",
    "monteclora_config": "methods.monteclora:MontecloraConfig",
    "kasa_config": "methods.kasa:KasaConfig",
    "use_bdlora": "methods.bdlora:BdLoraConfig",
    "arrow_config": "unbuilt:ArrowConfig",
    "eva_config": "inits.eva:EvaConfig",
    "corda_config": "inits.corda:CordaConfig",
    "lora_ga_config": "inits.lora_ga:LoraGAConfig",
}
"""Field -> the class of its value, next to what it configures."""

VARIANTS = {
    "use_dora": "dora:Dora",
    "use_qalora": "qalora:QALora",
    "use_bdlora": "bdlora:BdLora",
    "kasa_config": "kasa:Kasa",
    "velora_config": "velora:Velora",
    "monteclora_config": "monteclora:Monteclora",
    "alora_invocation_tokens": "alora:ALora",
}
"""Field that asks for it -> module of methods : class."""

_NOT_BUILT = (
    "megatron_config", "arrow_config",
)  # fmt: skip

_LORA_ONLY = ("target_parameters", "ensure_weight_tying", "layer_replication")

_OF_INIT = {"eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config"}
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


@dataclass
class LoraRuntimeConfig:
    """Options that are never saved.

    ephemeral_gpu_offload: accepted with a warning; starts are computed where the weights are."""

    ephemeral_gpu_offload: bool = False

    def __post_init__(self) -> None:
        if self.ephemeral_gpu_offload:
            warnings.warn(
                "ephemeral_gpu_offload=True has no effect in fastadapt: starts are computed on the "
                "device of the base's weights; move the model to a GPU for faster ones",
                FastAdaptWarning,
                stacklevel=3,
            )


@dataclass
class LoraConfig(AdapterConfig):
    """PEFT's LoraConfig, every field.

    r: the rank, at least 1; lora_alpha: s = lora_alpha / r; lora_dropout: on the low-rank part's
    input, in [0, 1); bias: "none", "all" or "lora_only"; rank_pattern, alpha_pattern: pattern ->
    value; use_rslora: s = lora_alpha / sqrt(r); lora_bias: B has a bias; init_lora_weights: True,
    False or a name of ``fastadapt.inits``, some with a config of their own (loftq_config,
    eva_config, corda_config, lora_ga_config); at most one variant: use_dora, use_qalora,
    use_bdlora, kasa_config, velora_config, monteclora_config, alora_invocation_tokens (the adapter
    acts from these tokens on), each in its file of ``fastadapt.methods``.
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
    layer_replication: list[list[int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    path = ""
    """The module that this copy is for, where a variant asks: set by ``at``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA  # type: ignore[attr-defined]
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        for name in SUBCONFIGS:
            with noting(self):
                setattr(self, name, subconfig(name, getattr(self, name)))
        for rank in (self.r, *self.rank_pattern.values()):
            with noting(self):
                _check_rank(rank)
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or not abs(alpha) <= 1e6:
                text = f"lora_alpha: expected a finite number up to 1e6, got {alpha!r}"
                note(self, ConfigError(text))
        rate(self, "lora_dropout")
        with noting(self):
            self._check_init()
        if self.use_dora and self.megatron_config:
            text = "DoRA does not support megatron_core, please set `use_dora=False`."
            note(self, ConfigError(text))
        asked = [name for name in VARIANTS if getattr(self, name)]
        if len(asked) > 1:
            text = f"{' and '.join(asked)}: variants of LoRA do not combine, choose one"
            note(self, ConfigError(text))
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            warnings.warn(
                "aLoRA is currently only supported for CAUSAL_LM task.", FastAdaptWarning,
                stacklevel=4,
            )  # fmt: skip
        if asked and self.lora_bias and not self.alora_invocation_tokens:
            text = f"The argument lora_bias=True is not supported with {asked[0]}, set one of them."
            note(self, ConfigError(text))

    def _check_init(self) -> None:
        init_of(self.init_lora_weights)
        name = str(self.init_lora_weights).lower()
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or "
                f"False, got init_lora_weights={self.init_lora_weights!r} instead."
            )
        if name == "loftq":
            if not self.loftq_config:
                raise ConfigError(
                    "`loftq_config` must be specified when `init_lora_weights` is 'loftq'."
                )
            if not isinstance(self.loftq_config, dict):
                self.loftq_config = dict(vars(self.loftq_config))
        elif self.loftq_config:
            self.loftq_config = {}
            _ignored("loftq_config", "loftq")
        for key, own in _OF_INIT.items():
            if name == key and getattr(self, own) is None and key != "lora_ga":
                setattr(self, own, subconfig(own, {}))
                shown = {"eva": "EVA", "corda": "CorDA"}.get(key, key)
                warnings.warn(
                    f"`init_lora_weights` is '{key}' but `{own}` is not specified. Using default "
                    f"{shown} config.",
                    FastAdaptWarning,
                    stacklevel=5,
                )
            elif name != key and getattr(self, own) is not None:
                _ignored(own, key)
        if (
            self.use_rslora
            and (self.rank_pattern or self.alpha_pattern)
            and name.startswith(_CHANGES_BASE)
        ):
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training "
                "conversion (`path_initial_model_for_weight_conversion`) is refused when the "
                "adapter is saved: one alpha cannot give each layer its scale at twice its rank",
                FastAdaptWarning,
                stacklevel=5,
            )

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("runtime_config")
        return values

    def at(self, path: str) -> LoraConfig:
        if not (self.rank_pattern or self.alpha_pattern or self.use_bdlora):
            return self
        r = pattern_value(self.rank_pattern, path, self.r)
        alpha = pattern_value(self.alpha_pattern, path, self.lora_alpha)
        made = self.resized(r, alpha)
        made.path = path
        return made

    def resized(self, r: int, alpha: float) -> LoraConfig:
        """The same for a layer with another rank and alpha."""
        # a copy without a second check of every field: it is made for each layer, and patterns may
        # be as many as the layers
        _check_rank(r)
        made = copy.copy(self)
        made.r, made.lora_alpha = r, alpha
        return made

    @property
    def scaling(self) -> float:
        """s."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def check_built(self) -> None:
        """Raise UnsupportedError for the first field whose behaviour is not built yet."""
        if self.bias not in ("none", "all", "lora_only"):
            raise UnsupportedError(
                f"Requested bias: {self.bias}, is not implemented. Use none, all or lora_only."
            )
        for name in _NOT_BUILT:
            self._refuse(name)

    def check_plain(self) -> None:
        """For methods with LoRA's fields and a form of their own: no variant and no other start."""
        self.check_built()
        for name in (*VARIANTS, *_LORA_ONLY):
            self._refuse(name)
        if self.init_lora_weights not in (True, False):
            raise UnsupportedError(
                f"{type(self).__name__}.init_lora_weights={self.init_lora_weights!r}: the method "
                "has a start of its own; use True or False"
            )

    def _register_custom_module(self, mapping: Any) -> None:
        raise UnsupportedError(
            "_register_custom_module: PEFT's layer classes have no place in fastadapt; a layer of "
            "another kind is a file of fastadapt.kinds"
        )

    def _refuse(self, name: str) -> None:
        if getattr(self, name):
            raise UnsupportedError(
                f"{type(self).__name__}.{name}={getattr(self, name)!r}: not built in fastadapt; "
                "leave it at its default"
            )

    def variant(self) -> type[Any] | None:
        """The class of the variant that a field asks for, None for plain LoRA."""
        asked = next((home for name, home in VARIANTS.items() if getattr(self, name)), None)
        if asked is None:
            return None
        module, _, cls = asked.partition(":")
        found: type[Any] = getattr(import_module(f"fastadapt.methods.{module}"), cls)
        return found


def subconfig(name: str, value: Any) -> Any:
    """The value of a field with a configuration of its own: from an object of its class, ours or
    PEFT's, or from a dict, as files have it. Unknown keys of a dict are left out with a warning."""
    if value is None:
        return None
    module, _, cls = SUBCONFIGS[name].partition(":")
    own: Any = getattr(import_module(f"fastadapt.{module}"), cls)
    if isinstance(value, own):
        return value
    if dataclasses.is_dataclass(value) and type(value).__name__ == cls:
        value = dataclasses.asdict(value)  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise FieldError(f"{name}: `{cls}` must be a `{cls}`, a dict, or None.")
    known = {f.name for f in dataclasses.fields(own) if f.init}
    unknown = sorted(set(value) - known)
    if unknown:
        warnings.warn(f"{cls} has no field {unknown}: ignored", FastAdaptWarning, stacklevel=5)
    return own(**{k: v for k, v in value.items() if k in known})


def _ignored(name: str, init: str) -> None:
    warnings.warn(
        f"`{name}` specified but will be ignored when `init_lora_weights` is not '{init}'.",
        FastAdaptWarning,
        stacklevel=6,
    )


def _check_rank(rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ConfigError(f"r: expected an integer, got {rank!r}")
    if not 0 < rank <= MAX_RANK:
        raise ConfigError(
            f"`r` should be a positive integer value (at most {MAX_RANK}) but the value passed is "
            f"{rank}"
        )
