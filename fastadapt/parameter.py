# SPDX-License-Identifier: Apache-2.0
"""A parameter of a module with adapters: the module's own forward sees W' in the place of W.

Each wrapper adapts one parameter. Several of one module are wrapped one around the other, in the
order in which the module has them, the first innermost; that is how PEFT's files know them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt import targets
from fastadapt.base import FrozenLayer
from fastadapt.errors import UnsupportedError
from fastadapt.kinds import Parameter
from fastadapt.layer import AdaptedLayer
from fastadapt.rows import Rows
from fastadapt.weights import DenseParameter


class FrozenParameter(FrozenLayer):
    """The base that is one parameter of ``layer``."""

    def __init__(self, layer: nn.Module, key: str) -> None:
        self.layer, self.key = layer, key
        self.kind, self.weight = Parameter(layer, key), DenseParameter(layer, key)

    @property
    def bias(self) -> Tensor | None:
        return None

    def restore(self, held: tuple[tuple[Any, ...], Tensor | None]) -> None:
        self.weight.restore(held[0])

    def why_not_fused(self) -> str | None:
        return f"the module uses its parameter {self.key} itself"


@contextmanager
def holding(layer: nn.Module, key: str, w: Tensor) -> Iterator[None]:
    """Inside, the module's own parameter ``key`` is ``w``, oriented as the module has it."""
    chains: Any = getattr(layer, "parametrizations", {})
    if key in chains:
        steps = chains[key]
        steps.append(_Constant(w))
        try:
            yield
        finally:
            del steps[len(steps) - 1]
        return
    own: dict[str, Any] = layer._parameters
    before, own[key] = own[key], w
    try:
        yield
    finally:
        own[key] = before


class AdaptedParameter(AdaptedLayer):
    """The module at ``base_layer``, perhaps in another such wrapper, with adapters of its parameter
    ``parameter_name``. The parameter itself, read from outside of the forward, stays as it was."""

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer)

    def _freeze(self, base_layer: nn.Module) -> FrozenLayer:
        return FrozenParameter(innermost(base_layer), self.parameter_name)

    @property
    def in_features(self) -> int:
        return self.frozen.shape[-1]

    @property
    def out_features(self) -> int:
        return self.frozen.shape[-2]

    @property
    def num_experts(self) -> int:
        shape = self.frozen.shape
        return shape[0] if len(shape) == 3 else 1

    def get_base_layer(self) -> Any:
        return innermost(self.base_layer)

    def get_param(self) -> Tensor:
        held: Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return held

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        rows = Rows(adapter_names) if adapter_names is not None else self.rows
        if rows is not None and any(name in self.adapters for name in rows.names):
            raise UnsupportedError(
                "lora.ParamWrapper does not support mixed adapter batches yet. The module sees one "
                f"{self.parameter_name} for all rows: run the rows of each adapter by themselves"
            )
        if self._disabled and self.merged:
            self.unmerge()
        adapters = self._running
        if rows is not None or self._disabled or self.merged or not adapters:
            return self.base_layer(*args, **kwargs)
        frozen: Any = self.frozen
        w = narrowed(self._under(adapters, (), None).read()[0], frozen.weight.value.dtype)
        with holding(frozen.layer, frozen.key, frozen.orient(w)):
            return self.base_layer(*args, **kwargs)

    def _get_name(self) -> str:
        return "lora.ParamWrapper"

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"


class Place(NamedTuple):
    """Where a parameter's adapter goes.

    path: of its wrapper, once every wrapper of the plan is there; module: the path of the module;
    key: the parameter's name; layer: the wrapper that other adapters have there already."""

    path: str
    module: str
    key: str
    layer: AdaptedParameter | None

    @property
    def name(self) -> str:
        return f"{self.module}.{self.key}"


def places(model: nn.Module, names: Sequence[str], taken: Sequence[str]) -> list[Place]:
    """The parameters whose path is one of ``names`` or ends in it, the inner of a module's first.

    taken: paths of modules that get adapters themselves. Raises UnsupportedError for parameters of
    those, and of the model itself, which nothing can be wrapped around."""
    top = [k for k in _keys(model) if k in names]
    if top:
        raise UnsupportedError(
            "Targeting an nn.Parameter on the top-level module is not supported (parameter "
            f"'{top[0]}'). Give it to a module of its own inside of the model"
        )
    found: list[Place] = []
    modules = list(targets.walk(model))
    inner = {id(m.base_layer) for _, m in modules if isinstance(m, AdaptedParameter)}
    for path, module in modules:
        if "original_module" in module._modules or id(module) in inner:
            continue
        bottom = innermost(module)
        keys = [k for k in _keys(bottom) if _hit(f"{path}.{k}", names)]
        held = wrappers(path, module)
        if keys and (path in taken or (isinstance(module, AdaptedLayer) and not held)):
            raise UnsupportedError(
                f"Trying to wrap an `nn.Parameter` of layer '{path}' of type "
                f"{type(bottom).__name__}, which is not a valid target. Make sure that this layer "
                "is not also targeted with `target_modules`. For some models, PEFT will do this "
                "automatically, try setting `target_modules=[]` to prevent it."
            )
        new = [k for k in keys if k not in held]
        for key, (at, layer) in held.items():
            if key in keys:
                found.append(Place(at + ".base_layer" * len(new), path, key, layer))
        found += [
            Place(path + ".base_layer" * (len(new) - 1 - i), path, key, None)
            for i, key in enumerate(new)
        ]
    return found


def wrappers(path: str, module: nn.Module) -> dict[str, tuple[str, AdaptedParameter]]:
    """parameter -> (path, wrapper) of a module's wrapped parameters, the innermost first."""
    found: dict[str, tuple[str, AdaptedParameter]] = {}
    while isinstance(module, AdaptedParameter):
        found[module.parameter_name] = (path, module)
        path, module = f"{path}.base_layer", module.base_layer
    return dict(reversed(found.items()))


def innermost(module: Any) -> Any:
    """The model's own module under adapted layers."""
    while isinstance(module, AdaptedLayer):
        module = module.base_layer
    return module


def depth(module: nn.Module) -> int:
    """How many adapted layers stand one in the other."""
    return 1 + depth(module.base_layer) if isinstance(module, AdaptedLayer) else 0


def narrowed(w: Tensor, dtype: torch.dtype) -> Tensor:
    """``w`` in the dtype of the parameter; into 8 bits, which have no infinity, it is clamped."""
    if w.dtype != dtype and dtype.itemsize == 1:
        info = torch.finfo(dtype)
        w = w.clamp(info.min, info.max)
    return w.to(dtype)


class _Constant(nn.Module):
    """A parametrisation that gives one tensor, whatever it gets."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        return self.w


def _keys(module: nn.Module) -> list[str]:
    """The names of a module's own parameters; of a parametrised module sorted, as PEFT has it."""
    own = [k for k, p in module.named_parameters(recurse=False)]
    more = getattr(module, "parametrizations", None)
    return own if more is None else sorted([*own, *more])


def _hit(path: str, names: Sequence[str]) -> bool:
    return any(path == n or path.endswith(f".{n}") for n in names)
