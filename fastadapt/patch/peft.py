# SPDX-License-Identifier: Apache-2.0
"""``patch(peft_model)``: LoRA and DoRA layers that PEFT made run our ops over their own tensors.

Each layer stays the object that PEFT made; only its class becomes a dynamic subclass whose
``forward`` takes our path where that computes what PEFT's does, and PEFT's own otherwise. So
saving, merging, switching, adding and deleting adapters stay PEFT's. ``explain`` says which layer
runs what, and why.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from fastadapt.base import Base, FrozenLayer, Stacked, hold_weights, release_weights
from fastadapt.errors import LifecycleError, UnsupportedError
from fastadapt.methods.dora import Dora
from fastadapt.methods.lora import Lora

_SERVED = ("layer.Linear", "bnb.Linear4bit", "bnb.Linear8bitLt")
"""Of peft.tuners.lora, by exact class: a subclass may compute something else."""

_HELD = "_fastadapt_frozen"


class SpedUp:
    """What ``patch`` mixes in front of the class of a LoRA layer of PEFT's."""

    _plain: ClassVar[type[nn.Module]]

    @property
    def frozen(self) -> FrozenLayer:
        """The base layer, as our adapters see it."""
        return self.__dict__[_HELD]  # type: ignore[no-any-return]

    @property
    def adapters(self) -> dict[str, Lora]:
        """Our math over PEFT's tensors; a variant that is neither LoRA nor DoRA shows as LoRA."""
        layer: Any = self
        return {name: _adapter(layer, name) for name in layer.lora_A}

    def why_not_ours(self) -> str | None:
        """Why PEFT's own forward runs in the layer's present state; None when ours does."""
        layer: Any = self
        if layer.disable_adapters:
            return "the adapters are disabled"
        if layer.merged:
            return "adapters are merged"
        if layer.ephemeral_gpu_offload:
            return "ephemeral_gpu_offload moves the weights around each call"
        if not layer.cast_input_dtype_enabled:
            return "casting of the input is disabled"
        if layer.base_layer is not self.frozen.layer:
            return "the base layer was replaced after the patch"
        if _intercepted(layer.base_layer):
            return "the base layer's forward was replaced or has hooks"
        for i, name in enumerate(_active(layer)):
            variant = layer.lora_variant.get(name)
            if variant is not None and type(variant).__name__ != "DoraLinearVariant":
                return f"{type(variant).__name__} of adapter {name!r} is PEFT's alone"
            if variant is not None and i > 0:
                return f"PEFT adds DoRA {name!r} to the adapters before it by rules of its own"
            a, b, drop = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
            if type(a) is not nn.Linear or type(b) is not nn.Linear:
                return f"adapter {name!r} is a {type(a).__name__}, not a plain linear pair"
            if type(drop) not in (nn.Dropout, nn.Identity):
                return f"adapter {name!r} has a dropout of its own, {type(drop).__name__}"
            if _intercepted(a) or _intercepted(b):
                return f"the forward of adapter {name!r} was replaced or has hooks"
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = not args and all(value is None for value in kwargs.values())
        if not plain or self.why_not_ours() is not None:
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        base: Base = self.frozen
        for name in _active(self):
            base = Stacked(_adapter(self, name), base)
        return base(x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the dynamic class cannot be found by name: rebuild it from PEFT's
        return _rebuild, (type(self)._plain,), self.__dict__


def patch_peft(model: nn.Module) -> nn.Module:
    """Speed up the LoRA layers of a model that PEFT wrapped, in place; Parameters are shared.

    A second call takes the layers that were added since. Raises UnsupportedError (an adapter that
    is not LoRA, no layer that can be served) and LifecycleError (all of them are patched already)
    before anything is changed."""
    others = {
        name: str(getattr(config.peft_type, "value", config.peft_type))
        for name, config in _configs(model).items()
    }
    others = {name: kind for name, kind in others.items() if kind != "LORA"}
    if others:
        found = ", ".join(f"{kind} ({name!r})" for name, kind in others.items())
        raise UnsupportedError(
            f"patch serves PEFT models whose adapters are all LORA, found {found}: unload it, or "
            "patch the base model with a config of ours"
        )
    fresh, refused = _plan(model)
    patched = any(isinstance(module, SpedUp) for module in model.modules())
    if patched and not fresh:
        raise LifecycleError("every LoRA layer of the model is patched already: unpatch it first")
    if not fresh:
        raise UnsupportedError(
            "expected linear LoRA layers of PEFT over a dense, 4-bit or int8 weight, found "
            f"{'; '.join(sorted(refused)) or 'no LoRA layer'}"
        )
    hold_weights(model)
    for layer, frozen in fresh:
        layer.__dict__[_HELD] = frozen
        layer.__class__ = _sped_up(type(layer))  # type: ignore[arg-type]
    return model


def unpatch_peft(model: nn.Module) -> nn.Module:
    """Give the layers back to PEFT: classes and attributes as they were before ``patch_peft``."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, SpedUp)]
    if not layers:
        raise LifecycleError("expected a PeftModel that fastadapt patched, got one that is not")
    for layer in layers:
        layer.__class__ = type(layer)._plain
        layer.__dict__.pop(_HELD)
    release_weights(model)
    return model


def _configs(model: Any) -> dict[str, Any]:
    return dict(getattr(model, "peft_config", None) or {})


def _plan(model: nn.Module) -> tuple[list[tuple[Any, FrozenLayer]], set[str]]:
    """(layer, its base) of every layer to patch, and why others cannot be."""
    fresh: list[tuple[Any, FrozenLayer]] = []
    refused: set[str] = set()
    for module in model.modules():
        home, name = type(module).__module__, type(module).__name__
        if isinstance(module, SpedUp) or not home.startswith("peft.tuners.lora."):
            continue
        if not hasattr(module, "base_layer"):
            continue
        layer: Any = module
        if f"{home.rpartition('.')[2]}.{name}" not in _SERVED:
            refused.add(f"{home}.{name}")
            continue
        if not hasattr(layer, "lora_variant") or not hasattr(layer, "lora_bias"):
            raise UnsupportedError(
                "expected layers of peft >= 0.17, found older ones: upgrade peft"
            )
        try:
            fresh.append((layer, FrozenLayer(layer.base_layer)))
        except UnsupportedError as error:
            refused.add(str(error))
    return fresh, refused


def _active(layer: Any) -> list[str]:
    held = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in held]


def _adapter(layer: Any, name: str) -> Lora:
    """A view: the tensors, dropout and scaling are looked up in PEFT's layer at each call."""
    method = Dora if layer.lora_variant.get(name) is not None else Lora
    return method.over(layer, name)


def _intercepted(module: Any) -> bool:
    """Something stands between a call of the module and its class's forward."""
    return bool(
        "forward" in module.__dict__
        or "_hf_hook" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@cache
def _sped_up(cls: Any) -> Any:
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_plain": cls}
    return type(cls.__name__, (SpedUp, cls), members)


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    made: Any = _sped_up(cls)  # type: ignore[arg-type]
    return made.__new__(made)  # type: ignore[no-any-return]
