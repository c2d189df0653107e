# SPDX-License-Identifier: Apache-2.0
"""PEFT's helpers: scales, casts, signatures, and a cache for DoRA."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import nn

from fastadapt.config import PeftConfig
from fastadapt.errors import LifecycleError, UnsupportedError
from fastadapt.layer import AdaptedLayer
from fastadapt.methods.monteclora import Sampler, monteclora_loss

MontecloraSampler = Sampler


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or hub repository holds an adapter that can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Every LoRA's scale times ``multiplier`` inside the ``with``.

    Raises TypeError for what is no number, LifecycleError (a ValueError) without LoRA layers."""
    if not isinstance(multiplier, int | float):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    before = [(layer, layer.scaling) for layer in layers if hasattr(layer, "scaling")]
    if not before:
        raise LifecycleError("scaling is only supported for models with `LoraLayer`s")
    for layer, scaling in before:
        layer.scaling = {name: value * multiplier for name, value in scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inputs are not cast to the dtype of the adapter's weights inside the ``with``.

    That is how fastadapt's own LoRA on a linear layer always is: its factors take the dtype that
    the input computes in. Layers that PEFT made and ``patch`` runs obey the switch; other layers
    of fastadapt (convolutions, embeddings) cast the adapter's input either way, and their result
    has the base's dtype."""
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = old


class DoraCaching:
    """Accepted for DoRA inference: ``with DoraCaching():`` and ``DoraCaching()(enabled=False)``.

    DoRA here keeps no cache between calls, its norms come from one fused pass: there is nothing to
    switch, and results are the same."""

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = enabled

    @contextmanager
    def __call__(self, enabled: bool = True) -> Iterator[None]:
        yield

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class MontecloraTrainerMixin:
    """``class MyTrainer(MontecloraTrainerMixin, Trainer)``: its loss has MonteCLoRA's variational
    loss of the active adapters added."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        parent: Any = super()
        found = parent.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
        extra = monteclora_loss([m.adapters[n] for m in layers for n in m.active_adapters
                                 if n in m.adapters])  # fmt: skip
        return (found[0] + extra, *found[1:]) if return_outputs else found + extra


def update_forward_signature(model: Any) -> None:
    """Give the wrapper's ``forward`` the signature of the base model's."""
    _copy_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Give the wrapper's ``generate`` the signature of the base model's."""
    _copy_signature(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """The signatures of ``forward``, ``generate``, or of "all" that the model has."""
    if method not in ("forward", "generate", "all"):
        raise UnsupportedError(
            f"method {method} is not supported please choose one of ['forward', 'generate', 'all']"
        )
    if method in ("forward", "all"):
        update_forward_signature(model)
    if method in ("generate", "all"):
        update_generate_signature(model)


def _copy_signature(model: Any, name: str) -> None:
    current = inspect.signature(getattr(model, name)).parameters
    if [p.kind for p in current.values() if p.name in ("args", "kwargs")] != [
        inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD,
    ]:  # fmt: skip
        return
    source = getattr(type(model.get_base_model()), name)
    own = getattr(type(model), name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    call.__signature__ = inspect.signature(source)  # type: ignore[attr-defined]
    call.__doc__, call.__name__ = source.__doc__, name
    setattr(model, name, types.MethodType(call, model))
