# SPDX-License-Identifier: Apache-2.0
"""``patch``: adapters in a model in place. The same object comes back, with a class of its own.

The class is a dynamic subclass of the model's, so that ``isinstance``, ``forward`` and its
signature stay what they were; Trainer, TRL and Accelerate see a transformers model that carries
adapters. What comes back does not depend on whether ``peft`` is installed.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from torch import Tensor, nn

from fastadapt import inject, saving
from fastadapt.config import as_config
from fastadapt.errors import LifecycleError, TargetError
from fastadapt.merge import LEAST
from fastadapt.model import Adapters


class PatchedModel(Adapters):
    """What ``patch`` mixes in front of a model's class."""

    _hf_peft_config_loaded = True
    _plain: type[nn.Module]

    @property
    def adapter_root(self) -> nn.Module:
        return self  # type: ignore[return-value]

    @property
    def peft_config(self) -> dict[str, Any]:
        return self._configs

    def active_adapters(self) -> list[str]:
        """A method, as in transformers (in PEFT's own class it is a property)."""
        return self._active_names()

    def active_adapter(self) -> str:
        return self._active_names()[0]

    def enable_adapters(self) -> None:
        self.enable_adapter_layers()

    def disable_adapters(self) -> None:
        self.disable_adapter_layers()

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The adapter's tensors under the model's own paths."""
        name = adapter_name or self.active_adapter()
        found = saving.adapter_state_dict(
            self.adapter_root, self._configs[name], name, state_dict=state_dict
        )
        return {k.removeprefix("base_model.model."): v for k, v in found.items()}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        selected_adapters: list[str] | None = None,
        safe_serialization: bool = True,
        save_embedding_layers: bool | str = "auto",
        **_: Any,
    ) -> None:
        """Write the adapters (not the base) in PEFT's layout: "default" into the folder, every
        other into a subfolder of its name."""
        if not is_main_process:
            return
        save_adapters(
            self, save_directory, selected_adapters, state_dict=state_dict,
            safe_serialization=safe_serialization, save_embedding_layers=save_embedding_layers,
        )  # fmt: skip

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        keep: str | None = None,
        keep_share: float = LEAST,
    ) -> nn.Module:
        """The plain model again, the adapters (default: the active ones) in its weights; ``keep``
        is ``merge_adapter``'s, and ``merge_report`` of the model says what was kept."""
        self._strip(True, safe_merge, adapter_names, progressbar, keep=keep, keep_share=keep_share)
        return _restore(self)

    def unload(self) -> nn.Module:
        """The plain model again, as it was before ``patch``."""
        self._strip(False, False, None, False)
        return _restore(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the dynamic class cannot be found by name: rebuild it from the model's own
        return _rebuild, (type(self)._plain,), self.__dict__


def patch(
    model: nn.Module,
    config: Any = None,
    adapter_name: str = "default",
    *,
    allow_unmatched: bool = False,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Put adapters into ``model``, in place, and return it; or speed up a model of PEFT.

    config: a LoraConfig (ours or PEFT's), or None for a model that PEFT wrapped
    allow_unmatched: names in target_modules that match nothing warn instead of raising
    autocast_adapter_dtype: adapters of a half-precision base train in float32

    Raises ConfigError, TargetError, UnsupportedError before the model is changed.
    """
    if _is_peft(model) and config is None:
        from fastadapt.patch.peft import patch_peft

        return patch_peft(model)
    if config is None:
        raise TargetError("expected a config such as LoraConfig(r=16); only a PeftModel needs none")
    if isinstance(model, PatchedModel):
        model.add_adapter(
            adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype,
            allow_unmatched=allow_unmatched,
        )  # fmt: skip
        return model
    if _is_peft(model) or any(True for _ in inject.adapted(model)):
        raise LifecycleError("the model has adapters already: unload them first, or add_adapter")
    config = as_config(config)
    made = inject.plan(model, config, allow_unmatched=allow_unmatched)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    patched: Any = model
    patched.__class__ = _patched_class(type(model))  # type: ignore[arg-type]
    patched.__dict__["_configs"] = {}
    patched.__dict__["_trainable_before"] = trainable
    try:
        patched._check_new(adapter_name, config)
        patched._attach(made, adapter_name, autocast_adapter_dtype)
    except BaseException:
        patched.unload()
        raise
    from fastadapt.patch import ecosystem

    ecosystem.entered(patched)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo ``patch``: the base weights, classes and trainability as they were."""
    if isinstance(model, PatchedModel):
        plain: nn.Module = model.unload()
        return plain
    if _is_peft(model):
        from fastadapt.patch.peft import unpatch_peft

        return unpatch_peft(model)
    raise LifecycleError(f"expected a model that fastadapt patched, got {type(model).__name__}")


def save_adapters(model: Adapters, folder: Any, selected: list[str] | None, **options: Any) -> None:
    """Write the chosen adapters; all are checked before the first is written."""
    names = list(model._configs) if selected is None else selected
    unknown = [n for n in names if n not in model._configs]
    if unknown:
        raise LifecycleError(
            f"You passed an invalid `selected_adapters` arguments, current supported adapter names "
            f"are {list(model._configs)} - got {names}."
        )
    chosen = {n: model._configs[n] for n in names}
    saving.save(model.adapter_root, chosen, folder, **options)


@cache
def _patched_class(cls: Any) -> Any:
    return type(cls.__name__, (PatchedModel, cls), {"__module__": cls.__module__, "_plain": cls})


def _restore(model: Any) -> nn.Module:
    """The model's own class, attributes and trainability."""
    trainable = model.__dict__.pop("_trainable_before")
    model.__dict__.pop("_configs")
    model.__class__ = type(model)._plain
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in trainable)
    untie(model)
    from fastadapt.patch import ecosystem

    ecosystem.left(model)
    return model  # type: ignore[no-any-return]


def untie(model: Any) -> None:
    """The config says that embeddings are tied only where they are."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    try:
        head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return
    if head is not None and head.weight is not tokens.weight:
        config.tie_word_embeddings = False


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    made: Any = _patched_class(cls)  # type: ignore[arg-type]
    return made.__new__(made)  # type: ignore[no-any-return]


def _is_peft(model: nn.Module) -> bool:
    return any(c.__module__.startswith("peft.") for c in type(model).__mro__) and not isinstance(
        model, Adapters
    )
