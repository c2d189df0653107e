# SPDX-License-Identifier: Apache-2.0
"""Configurations of the methods of PEFT that are not built yet: its fields, checks and json.

Scripts make, save and read them; ``get_peft_model`` refuses them by name. A class leaves this file
when its method is built.
"""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass, field
from typing import Any

from fastadapt.config import PeftConfig, PeftType, TaskType
from fastadapt.errors import ConfigError, FastAdaptWarning


class PromptTuningInit(str, enum.Enum):  # noqa: UP042 - PEFT's, with its str()
    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class MultitaskPromptTuningInit(str, enum.Enum):  # noqa: UP042
    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(str, enum.Enum):  # noqa: UP042
    MLP = "MLP"
    LSTM = "LSTM"


class _Typed(PeftConfig):
    """Sets ``peft_type`` to the class's own; names of modules are sets."""

    _type = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self._type)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name, None), list):
                setattr(self, name, set(getattr(self, name)))


@dataclass
class PromptLearningConfig(_Typed):
    """What the methods share that put virtual tokens in front of the input.

    num_virtual_tokens: how many; the sizes are filled in from the model when None.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        if self._type:
            super().__post_init__()
        else:
            PeftConfig.__post_init__(self)

    @property
    def is_prompt_learning(self) -> bool:
        return True


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (arXiv 2104.08691). prompt_tuning_init: TEXT, SAMPLE_VOCAB or RANDOM."""

    prompt_tuning_init: str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    _type = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        text = self.prompt_tuning_init == "TEXT"
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            value = getattr(self, name)
            if text and (value is None or (name == "tokenizer_name_or_path" and not value)):
                raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be {value}.")
        if self.tokenizer_kwargs and not text:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning (arXiv 2303.02861)."""

    prompt_tuning_init: str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    _type = "MULTITASK_PROMPT_TUNING"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (arXiv 2103.10385). encoder_reparameterization_type: MLP or LSTM."""

    encoder_reparameterization_type: str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    _type = "P_TUNING"


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning (arXiv 2101.00190). init_weights: None (random) or "zero" (a no-op)."""

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    _type = "PREFIX_TUNING"


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Cartridges (arXiv 2506.06266). num_frozen_tokens: of the prefix, kept as they start."""

    num_frozen_tokens: int = 1

    _type = "CARTRIDGE"

    def __post_init__(self) -> None:
        super().__post_init__()
        frozen, tokens = self.num_frozen_tokens, self.num_virtual_tokens
        if frozen < 0:
            raise ConfigError(f"`num_frozen_tokens` must be >= 0, got {frozen}.")
        if tokens is not None and frozen > tokens:
            raise ConfigError(
                f"`num_frozen_tokens` must be <= `num_virtual_tokens`, got "
                f"num_frozen_tokens={frozen} and num_virtual_tokens={tokens}."
            )


@dataclass
class CPTConfig(PromptLearningConfig):
    """Context-aware prompt tuning (arXiv 2410.17222); the three lists are of one length."""

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    _type = "CPT"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError("CPTConfig only supports task_type = CAUSAL_LM.")
        self.num_layers = self.token_dim = self.num_attention_heads = None
        self.num_transformer_submodules = 1
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        self.num_virtual_tokens = count = len(self.cpt_token_ids)
        self.cpt_mask = self.cpt_mask or [1] * count
        self.cpt_tokens_type_mask = self.cpt_tokens_type_mask or [1] * count
        if not len(self.cpt_mask) == len(self.cpt_tokens_type_mask) == count:
            raise ConfigError(
                "cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length."
            )


@dataclass
class AdaptionPromptConfig(_Typed):
    """LLaMA-Adapter (arXiv 2303.16199): adapter_len tokens in the top adapter_layers layers."""

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    _type = "ADAPTION_PROMPT"

    @property
    def is_adaption_prompt(self) -> bool:
        return True


@dataclass
class PolyConfig(_Typed):
    """Polytropon and multi-head routing (arXiv 2202.13914, 2211.03831)."""

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    _type = "POLY"


@dataclass
class ShadowConfig(_Typed):
    """Shadow: a small backbone beside the base corrects the input of whole blocks."""

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    _type = "SHADOW"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        given = [f"shadow_{n}" for n in sizes if getattr(self, f"shadow_{n}") is not None]
        if self.shadow_model != "mirror" and given:
            raise ConfigError(f"{', '.join(given)}: for shadow_model='mirror' only")


@dataclass
class XLoraConfig(_Typed):
    """X-LoRA (arXiv 2402.07148): a classifier scales the LoRA ``adapters`` of each token."""

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    _type = "XLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        said = []
        if self.hidden_size is None:
            self.hidden_size = 4096
            said.append("No value was provided for `hidden_size`. It is 4096 by default.")
        if self.adapters is None:
            self.adapters = {}
            said.append("No value was provided for `adapters`. It is empty by default.")
        if self.enable_softmax_topk and self.top_k_lora is None:
            said.append("`enable_softmax_topk` enabled `top_k_lora` is not set")
        if self.enable_softmax_topk and self.enable_softmax:
            said.append(
                "`enable_softmax_topk` and `enable_softmax` are both enabled. This will result in "
                "worse performance."
            )
        if self.top_k_lora is not None and self.top_k_lora < 1:
            said.append("`top_k_lora` value must be at least 1.")
        for text in said:
            warnings.warn(text, FastAdaptWarning, stacklevel=4)


@dataclass
class ArrowConfig:
    """Arrow routes tokens among LoRA adapters (arXiv 2405.11157), and GenKnowSub takes general
    knowledge out of them first (aclanthology.org/2025.acl-short.54).

    top_k: adapters a token; router_temperature: of the softmax over them; use_gks: GenKnowSub."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        if self.top_k <= 0:
            raise ConfigError("top_k cannot be negative.")
        if self.router_temperature <= 0:
            raise ConfigError("router_temperature must be greater than 0.")
