# SPDX-License-Identifier: Apache-2.0
"""``model.base_model`` of a PeftModel: the base model under PEFT's lifecycle names."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastadapt import inject, saving
from fastadapt.config import AdapterConfig
from fastadapt.merge import LEAST
from fastadapt.model import Adapters


class Tuner(Adapters, nn.Module):
    """``model.base_model``: holds the base model as ``model``, under PEFT's lifecycle names."""

    def __init__(self, model: nn.Module, configs: dict[str, AdapterConfig], prefix: str) -> None:
        nn.Module.__init__(self)
        self.model = model
        self._configs = configs
        self.prefix = prefix

    @property
    def adapter_root(self) -> nn.Module:
        return self.model

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        return self._configs

    @property
    def active_adapters(self) -> list[str]:
        return self._active_names()

    @property
    def active_adapter(self) -> str | list[str]:
        names = self._active_names()
        return names[0] if len(names) == 1 else names

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        keep: str | None = None,
        keep_share: float = LEAST,
    ) -> nn.Module:
        """The base model, the adapters (default: the active ones) in its weights; ``keep`` is
        ``merge_adapter``'s, and ``merge_report`` of the model says what was kept."""
        from fastadapt.patch import loss
        from fastadapt.patch.inplace import untie

        model = self._strip(
            True, safe_merge, adapter_names, progressbar, keep=keep, keep_share=keep_share
        )
        loss.leave(model)
        untie(model)
        return model

    def unload(self) -> nn.Module:
        """The base model, without the adapters."""
        from fastadapt.patch import loss

        model = self._strip(False, False, None, False)
        loss.leave(model)
        return model

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """(What a file of the adapter holds, in float32 numbers; further trainable numbers)."""
        config = self._configs[adapter]
        tensors = saving.adapter_state_dict(
            self.model, config, adapter, save_embedding_layers=False
        )
        held = sum(t.numel() * t.element_size() for t in tensors.values()) // 4
        further = sum(p.numel() for n, p in self.named_parameters()
                      if p.requires_grad and self.prefix not in n)  # fmt: skip
        return held, further

    def print_savable_parameters(self) -> None:
        """One line, in PEFT's words."""
        held, further = self.get_nb_savable_parameters()
        print(  # noqa: T201
            f"{self.prefix.strip('_')} params to-be-saved (float32-equivalent): {held:,d} || "
            f"total params to-be-saved: {held + further:,d}"
        )

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> Any:
        """The loss of KaSA's paper, for the caller to add; 0.0 without KaSA."""
        from fastadapt.methods.kasa import kasa_loss

        return kasa_loss(self._named(adapter_names))

    def _get_monteclora_loss(self, adapter_names: str | list[str] | None = None) -> Any:
        """MonteCLoRA's variational loss, for the caller to add; 0.0 without it."""
        from fastadapt.methods.monteclora import monteclora_loss

        return monteclora_loss(self._named(adapter_names))

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        from fastadapt.compat.tied import _get_module_names_tied_with_embedding

        return _get_module_names_tied_with_embedding(self)

    def _named(self, names: str | list[str] | None) -> list[Any]:
        names = self._active_names() if names is None else names
        names = [names] if isinstance(names, str) else names
        return [a for n in names for a in inject.adapters_of(self.model, n).values()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            try:
                return getattr(self.model, name)
            except AttributeError:
                shared = self._shared(name)
                if shared is None:
                    raise
                return shared

    def _shared(self, name: str) -> Any:
        """By adapter: a part that the layers share and PEFT keeps here."""
        found: dict[str, Any] = {}
        for _, layer in self._adapted():
            if name in (*layer.adapter_layer_names, *layer.other_param_names):
                for key, part in getattr(layer, name).items():
                    where = layer.adapters[key].file_key(name, "") or ""
                    if where.startswith("/"):
                        found.setdefault(key, part)
        return found or None
