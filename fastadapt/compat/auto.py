# SPDX-License-Identifier: Apache-2.0
"""``AutoPeftModelFor*``: the base model that an adapter names, with the adapter on it."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from fastadapt import peft_model as models
from fastadapt.config import PeftConfig, TaskType
from fastadapt.errors import ConfigError, FastAdaptWarning
from fastadapt.files import fetch

TRUSTED = ("diffusers", "lerobot", "megatron-core", "transformers")
"""Packages that an adapter's file may name as the home of its base model's class."""


class AutoPeftModel:
    """For an adapter without a task; its file names the base model's class."""

    _base: str | None = None
    _wrapper: type[models.PeftModel] = models.PeftModel

    def __init__(self, *_: Any, **__: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using the "
            f"`{name}.from_pretrained(pretrained_model_name_or_path)` method."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load base and adapter; other arguments go to the base's ``from_pretrained``.

        A tokenizer beside the adapter with more tokens than the base has makes its embedding
        larger. Raises ConfigError for a task that is not this class's."""
        where = pretrained_model_name_or_path
        hub = {k: kwargs[k] for k in ("cache_dir", "token", "subfolder") if k in kwargs}
        found = PeftConfig.from_pretrained(where, revision=revision, **hub)
        base_cls = cls._base_class(found, TRUSTED if import_allowlist is None else import_allowlist)
        kwargs.pop("subfolder", None)
        base = base_cls.from_pretrained(
            found.base_model_name_or_path, revision=found.revision, **kwargs
        )
        _fit_embeddings(base, where, revision, kwargs)
        return cls._wrapper.from_pretrained(
            base, where, adapter_name=adapter_name, is_trainable=is_trainable, config=config,
            revision=revision, **hub,
        )  # fmt: skip

    @classmethod
    def _base_class(cls, config: Any, trusted: Any) -> Any:
        if config.task_type is not None:
            if cls._base is None:
                raise ConfigError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for "
                    "your task type. (e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            expected = models.BY_TASK[TaskType(config.task_type)]
            if cls._wrapper is not expected:
                raise ConfigError(
                    f"Expected target PEFT class: {expected.__name__}, but you have asked for: "
                    f"{cls._wrapper.__name__} make sure that you are loading the correct model for "
                    "your task type."
                )
            return getattr(import_module("transformers"), cls._base)
        mapping = config.auto_mapping
        if not mapping:
            raise ConfigError(
                "Cannot infer the auto class from the config, please make sure that you are "
                "loading the correct model for your task type."
            )
        library = mapping["parent_library"]
        if library not in trusted and not any(library.startswith(f"{t}.") for t in trusted):
            raise ConfigError(
                f"The auto mapping wants to import '{library}' which is not in the import "
                "allowlist. If you are sure that importing this library is safe, specify "
                f"`import_allowlist=['{library}']` in `from_pretrained()`."
            )
        return getattr(import_module(library), mapping["base_model_class"])


class AutoPeftModelForCausalLM(AutoPeftModel):
    _base, _wrapper = "AutoModelForCausalLM", models.PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    _base, _wrapper = "AutoModelForSeq2SeqLM", models.PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    _base = "AutoModelForSequenceClassification"
    _wrapper = models.PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    _base = "AutoModelForTokenClassification"
    _wrapper = models.PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    _base, _wrapper = "AutoModelForQuestionAnswering", models.PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    _base, _wrapper = "AutoModel", models.PeftModelForFeatureExtraction


def _fit_embeddings(base: Any, where: Any, revision: str | None, kwargs: dict[str, Any]) -> None:
    if fetch(str(where), "tokenizer_config.json", revision=revision) is None:
        return
    if not hasattr(base, "get_input_embeddings"):
        return
    from transformers import AutoTokenizer

    trust = kwargs.get("trust_remote_code", False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, revision=revision, token=kwargs.get("token"), trust_remote_code=trust
        )
    except OSError as error:
        if Path(where).exists():
            raise
        # its config is in the cache and the rest is out of reach; PEFT looks at neither offline
        warnings.warn(
            f"the tokenizer of {where} could not be read ({str(error).splitlines()[0]}): the "
            "embedding keeps its size",
            FastAdaptWarning,
            stacklevel=4,
        )
        return
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))
