# SPDX-License-Identifier: Apache-2.0
"""``get_peft_model`` and ``PeftModel``: a wrapper with PEFT's shape, ``base_model.model``.

Where ``peft`` can be imported the wrapper's class is also a subclass of ``peft.PeftModel`` and its
configs are also ``peft`` configs, so that every ``isinstance`` in the ecosystem holds.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastadapt import checkpoint, inject, invocation
from fastadapt.adapter_file import open_adapter
from fastadapt.config import AdapterConfig, TaskType, as_config
from fastadapt.errors import FastAdaptWarning, LifecycleError, UnsupportedError
from fastadapt.hollow import hollow
from fastadapt.joint import joint
from fastadapt.model import Adapters
from fastadapt.tuner import Tuner


class PeftModel(Adapters, nn.Module):
    """A base model with adapters.

    model: the base model, adapted in place; peft_config: a config, ours or PEFT's.
    """

    def __new__(cls, *_: Any, **__: Any) -> PeftModel:
        made: PeftModel = nn.Module.__new__(joint(cls))  # type: ignore[arg-type]
        return made

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        allow_unmatched: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        config = as_config(peft_config)
        self._configs: dict[str, AdapterConfig] = {}
        self._check_new(adapter_name, config)
        again = any(True for _ in inject.adapted(model))
        if again:
            from fastadapt.patch.inplace import PatchedModel

            if isinstance(model, PatchedModel):
                raise LifecycleError(
                    "the model has adapters that `patch` put in: unpatch it first, or add_adapter"
                )
            warnings.warn(
                "You are trying to modify a model with PEFT for a second time: it keeps its "
                "adapters, and one of this name starts anew. To load the model with a different "
                "config instead, call `.unload()` before.",
                FastAdaptWarning,
                stacklevel=3,
            )
        made = inject.plan(model, config, allow_unmatched=allow_unmatched)
        method = next(iter(made.adapters.values()))
        if again:
            inject.clear(model, made, adapter_name)
            self._configs.update(getattr(model, "peft_config", {}))
        self.base_model = Tuner(model, self._configs, method.prefix)
        self.peft_type = config.peft_type
        self._attach(made, adapter_name, autocast_adapter_dtype)
        if low_cpu_mem_usage:
            hollow(model, adapter_name)
        # on the base model as well, as PEFT has it: a second wrapper finds the adapters there
        vars(model)["peft_config"] = self._configs
        if again:
            self.set_adapter(adapter_name, config.inference_mode)
        if isinstance(self, PeftModelForCausalLM):
            from fastadapt.patch import loss

            loss.enter(model)
        if getattr(model, "is_activation_checkpointing", False):
            self.prepare_model_for_gradient_checkpointing(model)

    def _attach(self, made: inject.Plan, name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._attach(made, name, autocast_adapter_dtype)
        config = self._configs[name]
        config.__class__ = joint(type(config))

    @property
    def adapter_root(self) -> nn.Module:
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        return self._configs

    @property
    def active_adapters(self) -> list[str]:
        return self._active_names()

    @property
    def active_adapter(self) -> str:
        names = self._active_names()
        return names[0] if names else "default"

    @property
    def active_peft_config(self) -> AdapterConfig:
        return self._configs[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {m for c in self._configs.values() for m in c.modules_to_save or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> Any:
        return getattr(self.adapter_root, "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        return any(layer.active_adapters and not layer.disable_adapters
                   for _, layer in self._adapted())  # fmt: skip

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapted layers in it."""
        return self.adapter_root

    def get_layer_status(self) -> Any:
        """One record a layer with adapters."""
        from fastadapt.compat.status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """The layers' records, summed up."""
        from fastadapt.compat.status import get_model_status

        return get_model_status(self)

    def forward(
        self,
        *args: Any,
        adapter_names: list[str] | None = None,
        alora_offsets: list[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward; ``adapter_names``: one adapter a row of the batch;
        ``alora_offsets``: from how many tokens before the end on aLoRA acts in each row, where
        ``input_ids`` do not tell."""
        with self.mixed_batch(adapter_names), self._offsets(alora_offsets, kwargs.get("num_beams")):
            return self.base_model(*args, **kwargs)

    @contextmanager
    def _offsets(self, offsets: list[int | None] | None, beams: Any) -> Iterator[None]:
        if offsets is not None and isinstance(beams, int) and beams > 1:
            raise UnsupportedError(
                "Beam search not yet supported for aLoRA. (With given offsets: without them they "
                "are found in input_ids, for beams too.)"
            )
        with invocation.given(self.adapter_root, offsets):
            yield

    def generate(
        self,
        *args: Any,
        adapter_names: list[str] | None = None,
        alora_offsets: list[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's ``generate``, with ``forward``'s arguments."""
        settings = kwargs.get("generation_config") or getattr(
            self.adapter_root, "generation_config", None
        )
        repeats = [kwargs.get(n) or getattr(settings, n, None) or 1
                   for n in ("num_beams", "num_return_sequences")]  # fmt: skip
        with (
            self.mixed_batch(adapter_names, max(repeats)),
            self._offsets(alora_offsets, repeats[0]),
        ):
            return self.adapter_root.generate(*args, **kwargs)  # type: ignore[operator]

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Gradients for the inputs, which reentrant checkpointing needs of a frozen embedding."""
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: dict[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write the adapters in PEFT's layout: "default" into the folder, every other into a
        subfolder of its name.

        path_initial_model_for_weight_conversion: the folder of this adapter as it was before
        training, when its start (PiSSA, OLoRA, CorDA, LoRA-GA) changed the base: what is written
        is a plain LoRA of twice the rank for the untouched base; see ``plain_lora``."""
        from fastadapt.patch.inplace import save_adapters

        convert: Any = None
        if path_initial_model_for_weight_conversion is not None:
            from fastadapt.plain_lora import on_untouched_base

            convert = partial(on_untouched_base, initial=path_initial_model_for_weight_conversion)
        if is_main_process:
            save_adapters(
                self, save_directory, selected_adapters, state_dict=state_dict, convert=convert,
                safe_serialization=safe_serialization, save_embedding_layers=save_embedding_layers,
            )  # fmt: skip
            self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """README.md with what the hub needs; text that is there stays."""
        from fastadapt.compat.card import write_card

        write_card(self, output_dir)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        autocast_adapter_dtype: bool = True,
        *,
        strict: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """Wrap ``model`` with an adapter from a folder or hub repository.

        Everything is checked before the model is touched: CheckpointError lists every problem;
        ``strict=False`` warns and loads what fits. ``is_trainable=False`` loads it frozen."""
        kwargs.pop("low_cpu_mem_usage", None)
        if kwargs.pop("ephemeral_gpu_offload", False):
            text = "ephemeral_gpu_offload=True has no effect: files load to the base's device"
            warnings.warn(text, FastAdaptWarning, stacklevel=2)
        mismatched = bool(kwargs.pop("ignore_mismatched_sizes", False))
        if kwargs.get("key_mapping") is None:
            kwargs["key_mapping"] = getattr(model, "_checkpoint_conversion_mapping", None)
        adapter = open_adapter(
            model_id, root=model, config=None if config is None else as_config(config), **kwargs
        )
        checkpoint.check(model, adapter, strict=strict, ignore_mismatched_sizes=mismatched)
        adapter.config.inference_mode = not is_trainable
        if cls is PeftModel:
            cls = _class_for(adapter.config)
        made = cls(model, adapter.config, adapter_name, autocast_adapter_dtype)
        checkpoint.fill(model, adapter, adapter_name)
        if isinstance(config, AdapterConfig):
            made._keep(adapter_name, config)
        if not is_trainable:
            made.eval()
        return made

    def _keep(self, name: str, config: AdapterConfig) -> None:
        """The caller's own object is the adapter's configuration, as it came out of loading."""
        resolved = self._configs[name]
        config.__class__ = resolved.__class__
        vars(config).update(vars(resolved))
        self._configs[name] = config
        for adapter in inject.adapters_of(self.adapter_root, name).values():
            if adapter.config is resolved:
                adapter.config = config

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


class PeftModelForCausalLM(PeftModel):
    """For ``task_type="CAUSAL_LM"``."""


class PeftModelForSeq2SeqLM(PeftModel):
    """For ``task_type="SEQ_2_SEQ_LM"``; ``generate`` takes its arguments by name."""

    def generate(self, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().generate(**kwargs)


class PeftModelForSequenceClassification(PeftModel):
    """For ``task_type="SEQ_CLS"``."""


class PeftModelForTokenClassification(PeftModel):
    """For ``task_type="TOKEN_CLS"``."""


class PeftModelForQuestionAnswering(PeftModel):
    """For ``task_type="QUESTION_ANS"``."""


class PeftModelForFeatureExtraction(PeftModel):
    """For ``task_type="FEATURE_EXTRACTION"``."""


BY_TASK = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    allow_unmatched: bool = True,
) -> PeftModel:
    """Wrap ``model`` with a new adapter; PEFT's signature.

    low_cpu_mem_usage: parameters on the meta device, until ``set_peft_model_state_dict``. Raises
    ConfigError, TargetError, UnsupportedError before the model is changed."""
    config = as_config(peft_config)
    _warn_changes(model, config, revision)
    if revision is not None:
        config.revision = revision
    if mixed:
        from fastadapt.compat.mixed import PeftMixedModel

        return PeftMixedModel(
            model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage
        )
    return _class_for(config)(
        model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage,
        allow_unmatched=allow_unmatched,
    )  # fmt: skip


def _warn_changes(model: nn.Module, config: AdapterConfig, revision: str | None) -> None:
    """What get_peft_model changes in the config."""
    before, now = config.base_model_name_or_path, vars(model).get("name_or_path") or None
    said = []
    if before is not None and before != now:
        said.append(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{now}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint."
        )
    config.base_model_name_or_path = now
    if revision is not None and config.revision not in (None, revision):
        said.append(
            f"peft config has already set base model revision to {config.revision}, overwriting "
            f"with revision {revision}"
        )
    for text in said:
        warnings.warn(text, FastAdaptWarning, stacklevel=3)


def tuner(model: nn.Module, peft_config: Any, adapter_name: str = "default") -> Tuner:
    """``LoraModel(model, config, name)`` of PEFT: the ``base_model`` without a task's wrapper."""
    configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
    config = configs.get(adapter_name) or next(iter(configs.values()))
    made: Tuner = PeftModel(model, config, adapter_name).base_model
    return made


def _class_for(config: Any) -> type[PeftModel]:
    return BY_TASK[TaskType(config.task_type)] if config.task_type else PeftModel
