# SPDX-License-Identifier: Apache-2.0
"""``get_layer_status`` and ``get_model_status``: PEFT's records of what the layers' state is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from fastadapt.errors import LifecycleError
from fastadapt.layer import AdaptedLayer
from fastadapt.model import Adapters
from fastadapt.modules_to_save import ModulesToSaveWrapper

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer. requires_grad: adapter -> True, False, or "irregular" for a mix."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """All adapted layers together; "irregular" where they differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None = None


_BACKENDS = {"bnb4": "bnb 4bit", "bnb8": "bnb 8bit"}


def get_layer_status(model: Any) -> list[TunerLayerStatus]:
    """One record a layer with adapters. Raises LifecycleError (a ValueError) when there is none."""
    tuner = model.base_model if _is_wrapper(model) else model
    found = [_layer(name, module) for name, module in tuner.named_modules()
             if isinstance(module, AdaptedLayer | ModulesToSaveWrapper)]  # fmt: skip
    if not found:
        raise LifecycleError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that "
            "you have PEFT adapters injected in the model."
        )
    return found


def get_model_status(model: Any) -> TunerModelStatus:
    """The layers' records, summed up. Raises LifecycleError (a ValueError) without adapters."""
    wrapped = _is_wrapper(model)
    base_type, tuner_type, types = "other", "None", {}
    if wrapped:
        base_type = type(model.get_base_model()).__name__
        types = {n: str(getattr(c.peft_type, "value", c.peft_type))
                 for n, c in model.peft_config.items()}  # fmt: skip
        tuner_type = type(next(iter(model.peft_config.values()))).__name__
        tuner_type = tuner_type.removesuffix("Config") + "Model"
    elif any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__):
        base_type = type(model).__name__
    layers = get_layer_status(model)
    adapters = sorted({n for s in layers for n in s.available_adapters})
    trainable, total = Adapters.get_nb_trainable_parameters(model) if wrapped else _count(model)
    merged: list[str] | Irregular = sorted({n for s in layers for n in s.merged_adapters})
    if any({*s.available_adapters}.difference(s.merged_adapters) & {*merged} for s in layers):
        merged = "irregular"
    active = _same(tuple(s.active_adapters) for s in layers)
    backend = _same(s.quantization_backend for s in layers)
    return TunerModelStatus(
        base_model_type=base_type,
        adapter_model_type=tuner_type,
        peft_types=types,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same(s.enabled for s in layers),
        active_adapters=active if active == "irregular" else list(active),
        merged_adapters=merged,
        requires_grad={n: _same(s.requires_grad[n] for s in layers if n in s.requires_grad)
                       for n in adapters if any(n in s.requires_grad for s in layers)},
        available_adapters=adapters,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, [])}) for n in adapters},
        quantization_backend=backend,
    )  # fmt: skip


def _layer(name: str, module: Any) -> TunerLayerStatus:
    grads: dict[str, list[bool]] = {}
    devices: dict[str, set[str]] = {}
    for part in module.adapter_layer_names:
        for adapter, held in getattr(module, part).items():
            for tensor in [held] if isinstance(held, Tensor) else list(held.parameters()):
                if not isinstance(held, Tensor) or isinstance(held, nn.Parameter):
                    grads.setdefault(adapter, []).append(tensor.requires_grad)
                devices.setdefault(adapter, set()).add(tensor.device.type)
    stored = module.frozen.weight.name if isinstance(module, AdaptedLayer) else ""
    available = module.adapters if isinstance(module, AdaptedLayer) else module.modules_to_save
    return TunerLayerStatus(
        name=name,
        module_type=repr(module).partition("(")[0],
        enabled=not module.disable_adapters,
        active_adapters=module.active_adapters,
        merged_adapters=list(module.merged_adapters),
        requires_grad={n: _same(v) for n, v in grads.items()},
        available_adapters=sorted(available),
        devices={n: sorted(v) for n, v in devices.items()},
        quantization_backend=_BACKENDS.get(stored, None if stored in ("", "dense") else stored),
    )


def _same(values: Iterable[Any]) -> Any:
    seen = set(values)
    return seen.pop() if len(seen) == 1 else "irregular"


def _is_wrapper(model: Any) -> bool:
    return isinstance(model, Adapters) and hasattr(model, "get_base_model")


def _count(model: nn.Module) -> tuple[int, int]:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)
