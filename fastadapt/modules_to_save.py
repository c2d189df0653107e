# SPDX-License-Identifier: Apache-2.0
"""A module that is trained whole: one copy an adapter, the original kept frozen beside them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.errors import LifecycleError, ModuleTypeError, UnsupportedError
from fastadapt.freezing import freeze, thaw
from fastadapt.rows import BASE_NAME, Rows, grouped


class ModulesToSaveWrapper(nn.Module):
    """``original_module`` and its trained copies ``modules_to_save[adapter]``.

    Attributes that it does not have come from the copy in use (``weight``, ``out_features``)."""

    adapter_layer_names = ("modules_to_save",)
    other_param_names: tuple[str, ...] = ()
    merged_adapters: tuple[str, ...] = ()
    merged = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self._active: list[str] = []
        self._disabled = False
        self._trained: list[str] = []
        self.rows: Rows | None = None

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active[0] if self._active else []

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save)

    _adapters = property(_get_available_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @property
    def in_use(self) -> nn.Module:
        """The copy that a plain forward runs, or the original."""
        name = next((n for n in self._active if n in self.modules_to_save), None)
        if self._disabled or name is None:
            return self.original_module
        return self.modules_to_save[name]

    def add(self, name: str, tied: Any = None) -> None:
        """A fresh copy for this adapter; the original is frozen. tied: the wrapper of a module with
        the same weight, whose copy shares its own."""
        made: Any = copy.deepcopy(self.original_module)
        if tied is not None:
            made.weight = tied.modules_to_save[name].weight
        self.modules_to_save[name] = made
        self.original_module.requires_grad_(False)

    def choose(self, names: Sequence[str]) -> list[str]:
        """The one of ``names`` that has a copy here, or none. Raises LifecycleError for two."""
        present = [n for n in names if n in self.modules_to_save]
        if len(present) > 1:
            raise LifecycleError(
                f"Only one adapter can be set at a time for ModulesToSaveWrapper, got {present}"
            )
        return present

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._active = present = self.choose(names)
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in present and not inference_mode)
        self._trained = []

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.modules_to_save:
                self.modules_to_save[name].requires_grad_(requires_grad)
                self._trained = [n for n in self._trained if not n.startswith(f"{name}.")]

    def enable_adapters(self, enabled: bool) -> None:
        """As AdaptedLayer's; the original stays frozen."""
        if enabled and self._disabled:
            thaw(dict(self.modules_to_save), self._trained)
        elif not enabled and not self._disabled:
            self._trained = freeze(dict(self.modules_to_save))
        self._disabled = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self._active = [n for n in self._active if n != adapter_name]

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        rows = self.rows if adapter_names is None else Rows(adapter_names)
        if rows is None or self._disabled:
            return self.in_use(*args, **kwargs)
        if len(args) != 1 or kwargs:
            raise UnsupportedError(
                f"one adapter a row: expected one input of {type(self.original_module).__name__}, "
                f"which is trained whole, got {len(args)} and {sorted(kwargs)}"
            )
        x = args[0]
        parts, order = [], []
        for key, places in grouped(rows.of(x), self.modules_to_save).items():
            module = self.original_module if key == BASE_NAME else self.modules_to_save[key]
            order.append(torch.tensor(places, device=x.device))
            y = module(x.index_select(0, order[-1]))
            if not isinstance(y, Tensor):
                raise ModuleTypeError(
                    "Mixed batching is only supported for the following modules: Linear, "
                    "Embedding, Conv1d, Conv2d, Conv3d. And for others that give one tensor; "
                    f"{type(module).__name__}, which is trained whole, gives {type(y).__name__}"
                )
            parts.append(y)
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.in_use, name)
