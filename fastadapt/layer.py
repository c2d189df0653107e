# SPDX-License-Identifier: Apache-2.0
"""The only module that is inserted into a model: a base layer and its adapters.

It has PEFT's shape in the module tree (``base_layer``, ``lora_A.default.weight``), because
checkpoints, TRL, vLLM, accelerate and users' scripts select by those names. It owns the
parameters, the active stack and the merged state; nothing else keeps a flag.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter, Part
from fastadapt.base import Base, Called, FrozenLayer, Stacked
from fastadapt.constants import BufferDict, holder_for
from fastadapt.errors import LifecycleError
from fastadapt.freezing import freeze, thaw
from fastadapt.layer_class import class_of, name_of
from fastadapt.merge import LEAST, LayerMerge, check_keep, write
from fastadapt.rows import BASE_NAME, Rows, through
from fastadapt.values import Values


class AdaptedLayer(nn.Module):
    """base_layer with named adapters, of any mix of methods.

    forward(x, ..., adapter_names=None): ``adapter_names`` gives one adapter a row of the batch.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.frozen = self._freeze(base_layer)
        self.adapters: dict[str, Adapter] = {}
        self.merged_adapters: list[str] = []
        self._part_names: list[str] = []
        self._value_names: list[str] = []
        self._active: list[str] = []
        self._running: list[Adapter] = []
        self._disabled = False
        self._trained: dict[str, list[str]] = {}
        self._open: set[str] = set()
        self.cast_input_dtype_enabled = True
        self.rows: Rows | None = None
        self.offsets: dict[str, list[int | None]] | None = None
        self.group: Sequence[int] | None = None
        self._snapshots: list[Any] = []
        self.merge_share: LayerMerge | None = None
        self.frozen.weight.attach()
        self.train(base_layer.training)

    def _freeze(self, base_layer: nn.Module) -> FrozenLayer:
        return FrozenLayer(base_layer)

    # what PEFT's tools ask of a layer

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        return tuple(k for k in self._part_names if not isinstance(getattr(self, k), BufferDict))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        constant = [k for k in self._part_names if isinstance(getattr(self, k), BufferDict)]
        return (*constant, *self._value_names)

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active[0] if len(self._active) == 1 else list(self._active)

    # the name that PEFT's tests and tools write to
    _active_adapter = property(
        lambda self: self.active_adapter,
        lambda self, names: self._activate([names] if isinstance(names, str) else names),
    )

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    @property
    def quantization_backend(self) -> Any:
        """The format of a quantised base weight, None for a dense one."""
        weight = self.frozen.weight
        return weight if weight.quantised else None

    def extra_repr(self) -> str:
        weight = self.quantization_backend
        return "" if weight is None else f"quantization_backend={weight.name}"

    @property
    def in_features(self) -> int:
        return self.frozen.shape[1]

    @property
    def out_features(self) -> int:
        return self.frozen.shape[0]

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    _all_available_adapter_names = _get_available_adapters
    _adapters = property(_get_available_adapters)

    def __getattr__(self, name: str) -> Any:
        for adapter in self.__dict__.get("adapters", {}).values():
            if name and adapter.alias == name:
                return adapter.through(name)
        return super().__getattr__(name)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W of one adapter, in the orientation that the layer stores."""
        w, bias = self.frozen.read()
        merged, _ = self.adapters[adapter].merged(w, bias)
        return self.frozen.kind.orient(merged - w.to(merged.dtype))

    @property
    def frozen_peft_weight_names(self) -> dict[str, tuple[str, ...]]:
        """Adapter -> its parameters that never train."""
        return {name: a.frozen for name, a in self.adapters.items() if a.frozen}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA can stand for the adapter here; ``convert_to_lora`` makes it."""
        adapter = self.adapters.get(adapter_name)
        product = self.frozen.kind.product and len(self.frozen.shape) == 2
        return adapter is not None and adapter.converts and product

    # adapters

    def add(self, name: str, adapter: Adapter) -> None:
        """Take over the adapter's parts and values, on the base's device."""
        for key, part in adapter.parts.items():
            if key not in self._part_names:
                setattr(self, key, holder_for(part, adapter.file_key(key, "") is not None))
                self._part_names.append(key)
            held = getattr(self, key)
            if isinstance(held, nn.ModuleDict) and not isinstance(part, nn.Module):
                # two methods use one name, for a module and for a parameter: LoRA and AdaLoRA
                setattr(self, key, nn.ParameterDict(dict(held.items())))
            getattr(self, key)[name] = part
        for key, value in adapter.values.items():
            if key not in self._value_names:
                setattr(self, key, Values(key, self.adapters))
                self._value_names.append(key)
            getattr(self, key)[name] = value
        adapter.attach(self, name)
        self.adapters[name] = adapter
        method = str(getattr(adapter.config.peft_type, "value", adapter.config.peft_type)).lower()
        if type(self) is AdaptedLayer:
            self.__class__ = class_of(AdaptedLayer, method, name_of(self))
        for part in self.parts_of(name).values():
            if isinstance(part, nn.Module):
                part.train(self.training)
        self._activate(self._active)

    def parts_of(self, name: str) -> dict[str, Part]:
        """The modules, parameters and buffers of one adapter, by PEFT's names."""
        holders = {key: getattr(self, key) for key in self._part_names}
        return {key: holder[name] for key, holder in holders.items() if name in holder}

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these active, in this order, and trainable; those that were are frozen.

        Adapters that are neither are not looked at: switching costs the same with 2 and with 100.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in {*self._open, *self._active} - {*names}:
            self._set_requires_grad(name, False)
        self._activate(names)
        for name in names:
            self._set_requires_grad(name, not inference_mode)
        self._trained = {}

    def admit(self, name: str, active: Sequence[str], trainable: bool) -> None:
        """The model's active adapters, with the new one of this name; others stay as they are."""
        self._activate(list(active))
        self._set_requires_grad(name, trainable)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._set_requires_grad(name, requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off. None trains while it is off; what trained before does
        again, unless ``set_adapter`` or ``set_requires_grad`` said otherwise in between."""
        if enabled and self._disabled:
            for name, trained in self._trained.items():
                thaw(self.parts_of(name), trained)
        elif not enabled and not self._disabled:
            known = [n for n in self.adapters if n in self._open or n in self._active]
            self._trained = {name: freeze(self.parts_of(name)) for name in known}
        self._disabled = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget one adapter; merged weights are unmerged first."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        self.adapters.pop(adapter_name, None)
        self._trained.pop(adapter_name, None)
        self._open.discard(adapter_name)
        for key in self._part_names + self._value_names:
            getattr(self, key).pop(adapter_name) if adapter_name in getattr(self, key) else None
        self._activate([n for n in self._active if n != adapter_name])

    # scale (PEFT's names)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_value_names", ()) and isinstance(value, dict):
            value = Values(name, self.adapters, value)
        super().__setattr__(name, value)

    def set_scale(self, adapter: str, scale: float) -> None:
        """s = scale * alpha / r."""
        scaling = self._scaling()
        if adapter in scaling:
            scaling[adapter] = scale * self.adapters[adapter].config.scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        scaling = self._scaling()
        for name in [n for n in self._active if n in scaling]:
            scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters, or set it back to its start."""
        scaling = self._scaling()
        for name in [n for n in self._active if n in scaling]:
            start: float = self.adapters[name].config.scaling
            scaling[name] = start if scale is None else scaling[name] / scale

    def _scaling(self) -> dict[str, float]:
        scaling: dict[str, float] = self.__dict__.get("scaling", {})
        return scaling

    # merging

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        keep: str | None = None,
        keep_share: float = LEAST,
    ) -> bool:
        """Write the adapters (default: the active ones) into the base weight; False when there
        was nothing to do. ``merge_share`` says afterwards what the weight's format kept of them.

        ``safe_merge``: refuse a merged weight that is not finite; ``keep``: what to do when less
        than ``keep_share`` is kept, see ``fastadapt.merge``. ``unmerge`` restores the stored bits
        exactly."""
        check_keep(keep, keep_share)
        if isinstance(adapter_names, str):
            raise LifecycleError(
                f"adapter_names should be a list of strings, got {adapter_names!r}."
            )
        names = self._active if adapter_names is None else adapter_names
        left = [n for n in names if n not in self.merged_adapters]
        if self.merged and left:
            warnings.warn(
                f"Already following adapters were merged {','.join(self.merged_adapters)}. You are "
                f"now additionally merging {','.join(left)}.", stacklevel=2,
            )  # fmt: skip
        elif self.merged:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
        names = [n for n in left if n in self.adapters]
        if not names:
            return False
        with torch.no_grad():
            w, bias = self.stack(names).read()
            if safe_merge and not (
                torch.isfinite(w).all() and (bias is None or torch.isfinite(bias).all())
            ):
                raise LifecycleError(
                    f"NaNs detected in the merged weights. The adapter {names[0]} seems to be "
                    "broken"
                )
            frozen, held = self.frozen, self.frozen.snapshot()
            new_bias = None if bias is held[1] else bias
            self.merge_share, wide = write(frozen, w, new_bias, keep, keep_share)
        self._snapshots.append((frozen, held, list(self.merged_adapters)))
        if wide is not None:
            self.base_layer, self.frozen = wide, FrozenLayer(wide)
        self.merged_adapters.extend(names)
        return True

    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        del self._snapshots[1:]
        self.undo_merge()

    def undo_merge(self) -> None:
        """Put the base weight back as it was before the last merge that is still there."""
        device = self.frozen.weight.device
        before, held, self.merged_adapters = self._snapshots.pop()
        if before is not self.frozen:
            self.base_layer, self.frozen = before.layer, before
        self.merge_share = None
        self.frozen.restore(held)
        self.base_layer.to(device)

    # forward

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        if self._disabled:
            if self.merged:
                self.unmerge()
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        rows = self.rows
        if adapter_names is not None:
            self._refuse_unknown(adapter_names)
            rows = Rows(adapter_names)
        if rows is not None:
            return through(self, x, rows, args, kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        return self._under(self._running, args, kwargs)(x)

    def stack(
        self, names: Sequence[str], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Base:
        """The base layer under these adapters, first to last."""
        return self._under([self.adapters[n] for n in names if n in self.adapters], args, kwargs)

    def _under(
        self, adapters: Sequence[Adapter], args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Base:
        base: Any = Called(self.frozen, args, kwargs or {}) if args or kwargs else self.frozen
        for adapter in adapters:
            base = Stacked(adapter, base)
        return base  # type: ignore[no-any-return]

    def _activate(self, names: list[str]) -> None:
        """The adapters that run, in this order, readied for a compiled forward."""
        self._active = names
        present = [n for n in names if n in self.adapters]
        self._running = [self.adapters[n] for n in present]
        for name, adapter in zip(present, self._running, strict=True):
            parts = self.parts_of(name)
            modules = {k: p for k, p in parts.items() if isinstance(p, nn.Module)}
            values = {k: getattr(self, k) for k in self._value_names}
            adapter.hold(modules | {k: held[name] for k, held in values.items() if name in held})

    def _refuse_unknown(self, names: Sequence[str]) -> None:
        """For names that were given to this layer; those of the whole model (``rows``) may belong
        to other layers."""
        unknown = sorted({str(n) for n in names} - {*self.adapters, BASE_NAME})
        if unknown:
            raise LifecycleError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; this layer "
                f"has {sorted(self.adapters)}, and {BASE_NAME!r} is no adapter"
            )

    def _set_requires_grad(self, name: str, flag: bool) -> None:
        if name not in self.adapters:
            return
        (self._open.add if flag else self._open.discard)(name)
        fixed = self.adapters[name].constant + self.adapters[name].frozen
        self._trained.pop(name, None)
        for key, part in self.parts_of(name).items():
            if not isinstance(part, Tensor) or isinstance(part, nn.Parameter):
                part.requires_grad_(flag and key not in fixed)

    def _get_name(self) -> str:
        """What printed models show."""
        method = next((a.name for a in self.adapters.values()), "base")
        return f"{method}.{name_of(self)}"
