# SPDX-License-Identifier: Apache-2.0
"""Put the adapters of one configuration into a model: plan everything, then change the model.

``plan`` resolves targets and builds the adapters, and raises before the model is touched;
``attach`` inserts what was planned.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import attention, constants, refusals, targets, tying
from fastadapt.adapter import Adapter, Part
from fastadapt.base import FrozenLayer, hold_weights
from fastadapt.config import AdapterConfig, TaskType
from fastadapt.errors import (
    FastAdaptWarning,
    LifecycleError,
    ModuleTypeError,
    TargetError,
    UnsupportedError,
)
from fastadapt.kinds import kind_of
from fastadapt.layer import AdaptedLayer
from fastadapt.methods import method_of
from fastadapt.modules_to_save import ModulesToSaveWrapper
from fastadapt.parameter import AdaptedParameter, FrozenParameter, Place, innermost, places
from fastadapt.replication import Replication, replicated

_ATTENTION = nn.MultiheadAttention
_HEADS = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
"""Heads that a task always trains whole."""


@dataclass
class Plan:
    """What one configuration will put where.

    config: with targets resolved; adapters: path -> adapter, in the model's order;
    saved: paths of the modules that are trained whole; parameters: those of ``adapters`` that
    adapt one parameter of a module; paths are those once all of it is there (see ``after``);
    ties: which of them share what the input embedding gets; heads: those of ``parameters`` that
    are of an ``nn.MultiheadAttention``; layers: in the place of the model's.
    """

    config: AdapterConfig
    adapters: dict[str, Adapter]
    saved: list[str]
    parameters: dict[str, Place] = field(default_factory=dict)
    ties: tying.Ties = field(default_factory=tying.Ties)
    heads: set[str] = field(default_factory=set)
    layers: Replication | None = None

    def after(self, path: str) -> str:
        """The path of a module once the planned wrappers of parameters are there."""
        if path in self.parameters or path in {f"{p}.{attention.OUT}" for p in self.heads}:
            return path
        for place in self.parameters.values():
            if place.layer is None and path.startswith(f"{place.module}."):
                path = f"{place.module}.base_layer{path[len(place.module) :]}"
        return path


def plan(
    model: nn.Module, config: AdapterConfig, *, allow_unmatched: bool = True, meta: bool = False
) -> Plan:
    """Resolve and build, leaving the model alone. ``meta``: parameters without memory.

    Raises TargetError (nothing matched; a name without a match unless ``allow_unmatched``, which
    warns) and UnsupportedError (a target that cannot be adapted)."""
    ranges = getattr(config, "layer_replication", None)
    if not ranges:
        return _plan(model, config, allow_unmatched, meta)
    held = [a.config for _, m in adapted(model) if isinstance(m, AdaptedLayer)
            for a in m.adapters.values()]  # fmt: skip
    others = [getattr(c, "layer_replication", None) for c in held]
    made = replicated(model, ranges, others, any(True for _ in adapted(model)))
    if made is None:
        return _plan(model, config, allow_unmatched, meta)
    with made.shown():
        return dataclasses.replace(_plan(model, config, allow_unmatched, meta), layers=made)


def _plan(model: nn.Module, config: AdapterConfig, allow_unmatched: bool, meta: bool) -> Plan:
    method = method_of(config.peft_type).variant(config)
    config, ties = tying.resolve(model, config)
    config = _resolved(model, config)
    modules = dict(targets.walk(model))
    chosen = [p for p in targets.select(config, modules) if p not in ties.targets]
    wanted = getattr(config, "target_parameters", None) or []
    found = places(model, wanted, chosen) if wanted else []
    refusals.report(config, modules, chosen, found, allow_unmatched)
    refusals.refuse_fused(targets.model_type(model), config, chosen)
    heads = {p: modules[p] for p in chosen if isinstance(innermost(modules[p]), _ATTENTION)}
    others = [p for p in chosen if p not in heads and not _inside(p, modules, heads)]
    bases = {p: _base(p, modules[p]) for p in others}
    refusals.refuse_norms(method, bases)
    with targets.time_limit():
        own = {p: config.at(p) for p in chosen if p in bases or p in heads}
        own |= {place.path: config.at(place.name) for place in found}
    device = torch.device("meta") if meta else torch.device("cpu")
    with device:
        shared = method.shared(config, dict(bases))
        adapters: dict[str, Adapter] = {}
        for path in own:
            if path in heads:
                adapters.update(attention.plan(method, own[path], path, modules[path]))
            elif path in bases:
                adapters[path] = method(own[path], bases[path], shared)
        for place in found:
            layer = model.get_submodule(place.module)
            held = place.layer.frozen if place.layer else FrozenParameter(layer, place.key)
            adapters[place.path] = method.of_parameter(config)(own[place.path], held)
        parameters = {p: attention.place(p, m) for p, m in heads.items()}
        parameters.update({place.path: place for place in found})
        for path in ties.targets if ties.source in adapters else ():
            held = _base(path, modules[path])
            adapters[path] = method.tied(own[ties.source], held, adapters[ties.source])
        more = method.companions(config, model, adapters)
        taken = () if method.replaces_targets else adapters
        both = [p for p in more if p in taken or p not in modules]
        if both:
            raise UnsupportedError(
                f"{method.name}: {both[0]} is targeted, and some of its tokens are trained too: "
                "one adapter has one form at a layer, choose one"
            )
        adapters.update({p: make(_base(p, modules[p])) for p, make in more.items()})
    refusals.refuse_changes(
        {**modules, **{p: place.layer for p, place in parameters.items()}}, adapters
    )
    wanted = config.modules_to_save or []
    # PEFT's rule is a plain suffix here: "norm" takes input_layernorm too, and so do its files
    saved = [p for p in modules if p.endswith(tuple(wanted))]
    saved = [p for p in saved if not isinstance(modules[p], AdaptedLayer)]
    saved = [p for p in saved if not any(p.startswith(f"{outer}.") for outer in saved)]
    absent = [m for m in wanted if not any(p.endswith(m) for p in saved)]
    absent = [m for m in absent if m not in _task_heads(config)]
    if absent:
        raise TargetError(f"modules_to_save: no module is named {absent}")
    saved = [p for p in saved if p not in ties.saved]
    saved += ties.saved if ties.source in saved else ()
    for path in saved:
        _refuse_whole(path, modules[path])
    return Plan(config, adapters, saved, parameters, ties, set(heads))


def attach(model: nn.Module, made: Plan, name: str, *, autocast_adapter_dtype: bool = True) -> None:
    """Insert the planned adapters under ``name``; the first adapter of a model becomes active and
    the rest of the model is frozen."""
    if made.layers is not None:
        made.layers.install()
    layers = dict(adapted(model))
    if any(_holds(layers[p], name) for p in (*made.adapters, *made.saved) if p in layers):
        raise LifecycleError(f"Adapter with name {name} already exists.")
    first = not layers
    active = [name] if first else _active(model)
    if first:
        model.requires_grad_(False)
        hold_weights(model)
    placed: dict[int, Part] = {}
    for path, adapter in made.adapters.items():
        place = made.parameters.get(path)
        if place is None:
            layer = layers.get(path) or _replace(model, path, AdaptedLayer)
        else:
            wrapper = attention.AdaptedAttention if path in made.heads else AdaptedParameter
            layer = place.layer or _replace(
                model, place.module, partial(wrapper, parameter_name=place.key)
            )
        widen = autocast_adapter_dtype and not adapter.keeps_dtype
        _place(adapter, layer.frozen, widen, placed)
        layer.add(name, adapter)
        adapter.start(layer.frozen)
        layer.admit(name, active, name in active and not made.config.inference_mode)
    constants.share((model.get_submodule(made.after(path)) for path in made.adapters), name)
    for path in map(made.after, made.saved):
        wrapper = layers.get(path) or _replace(model, path, ModulesToSaveWrapper)
        first_copy = made.after(made.ties.source) if path in made.ties.saved else ""
        wrapper.add(name, model.get_submodule(first_copy) if first_copy else None)
        wrapper.set_adapter(active, inference_mode=made.config.inference_mode)
    set_bias_trainable(model, made.config, name, name in active and not made.config.inference_mode)


def clear(model: nn.Module, made: Plan, name: str) -> None:
    """Take the adapter ``name`` off the layers that the plan gives a new one of that name."""
    layers = dict(adapted(model))
    for path in (*made.adapters, *made.saved):
        if path in layers and _holds(layers[path], name):
            layers[path].delete_adapter(name)


def swap(layer: AdaptedLayer, name: str, adapter: Adapter) -> None:
    """Put another adapter in the place of one of this name, as trainable as that was."""
    old = nn.ModuleDict({k: p for k, p in layer.parts_of(name).items() if isinstance(p, nn.Module)})
    trains = any(p.requires_grad for p in old.parameters())
    _place(adapter, layer.frozen, not adapter.keeps_dtype, {})
    layer.add(name, adapter)
    adapter.start(layer.frozen)
    layer.set_requires_grad(name, trains)


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every adapted layer and every wrapper of a module trained whole."""
    return (
        (p, m) for p, m in targets.walk(model) if isinstance(m, AdaptedLayer | ModulesToSaveWrapper)
    )


def adapters_of(model: nn.Module, name: str) -> dict[str, Adapter]:
    """path -> the adapter of this name there."""
    layers = ((p, m) for p, m in adapted(model) if isinstance(m, AdaptedLayer))
    return {p: m.adapters[name] for p, m in layers if name in m.adapters}


def _inside(path: str, modules: dict[str, Any], heads: dict[str, Any]) -> bool:
    """The path is of attention's out_proj, which its attention brings along. Warns for one whose
    attention is not targeted: nobody calls it."""
    outer, _, name = path.rpartition(".")
    outer = outer.removesuffix(".base_layer")
    if name != "out_proj" or not isinstance(innermost(modules.get(outer)), _ATTENTION):
        return False
    if outer not in heads:
        warnings.warn(
            f"{path} is targeted, whose forward nn.MultiheadAttention never calls: an adapter "
            f"there has no effect; target {outer} instead", FastAdaptWarning, stacklevel=5,
        )  # fmt: skip
    return outer in heads


def all_linear(model: nn.Module) -> set[str]:
    """The paths that "all-linear" stands for."""
    return targets.linear_paths(model, _is_linear)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the submodule at ``path``."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def set_bias_trainable(model: nn.Module, config: AdapterConfig, name: str, trainable: bool) -> None:
    """``bias="all"`` trains every bias of the base, "<method>_only" those of adapted layers."""
    mode = getattr(config, "bias", "none")
    if mode == "none" or not trainable:
        return
    if mode == "all":
        for _, module in targets.walk(model):
            if not isinstance(module, ModulesToSaveWrapper):
                _train_bias(getattr(module, "base_layer", module))
        return
    for _, layer in adapted(model):
        if isinstance(layer, AdaptedLayer) and name in layer.adapters:
            _train_bias(layer.base_layer)


def _train_bias(layer: nn.Module) -> None:
    bias = getattr(layer, "bias", None)
    if isinstance(bias, nn.Parameter):
        bias.requires_grad_(True)


def _resolved(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """A copy with targets as names and the task's heads among modules_to_save."""
    wanted = config.target_modules
    if wanted is None:
        try:
            wanted = config.default_targets_in(model)
        except TargetError:
            if not getattr(config, "target_parameters", None):
                raise
            wanted = set()
        wanted = wanted if isinstance(wanted, str) else set(wanted)
    if isinstance(wanted, str) and wanted.lower() == targets.ALL_LINEAR:
        paths = all_linear(model)
        others = [p for p, _ in targets.walk(model) if p not in paths]
        wanted = targets.condense(paths, others)
    elif isinstance(wanted, set):
        names = [p for p, _ in targets.walk(model)]
        exact = {p for p in names if any(p == t or p.endswith("." + t) for t in wanted)}
        if len(wanted) >= 20 and exact and not config.repeats_targets:
            wanted = targets.condense(wanted, [p for p in names if p not in exact])
    # warnings were given when the configuration was made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastAdaptWarning)
        new = dataclasses.replace(config, target_modules=wanted)
    new = new.for_model(targets.model_type(model))
    heads = _task_heads(config)
    if heads:
        new.modules_to_save = [*(config.modules_to_save or [])]
        new.modules_to_save += [h for h in heads if h not in new.modules_to_save]
    return new


def _task_heads(config: AdapterConfig) -> list[str]:
    return _HEADS.get(TaskType(config.task_type), []) if config.task_type else []


def _is_linear(module: nn.Module) -> bool:
    layer = module.base_layer if isinstance(module, AdaptedLayer) else module
    kind = kind_of(layer)
    return kind is not None and kind.product


def _base(path: str, module: nn.Module) -> FrozenLayer:
    if isinstance(module, AdaptedParameter):
        raise UnsupportedError(
            f"Target module {path} is not supported: {module.parameter_name} of it has adapters "
            "of `target_parameters`"
        )
    if isinstance(module, AdaptedLayer):
        return module.frozen
    try:
        return FrozenLayer(module)
    except ValueError as error:
        raise type(error)(f"Target module {path} is not supported: {error}") from error


def _refuse_whole(path: str, module: nn.Module) -> None:
    """Training a module whole needs a forward, floating-point weights and no adapters inside."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        raise ModuleTypeError(
            f"modules_to_save cannot be applied to modules of type {type(module)}, which are not "
            f"called themselves; name the modules in {path}"
        )
    quantised = [n for n, p in module.named_parameters() if not p.is_floating_point()]
    if quantised and not isinstance(module, ModulesToSaveWrapper):
        raise UnsupportedError(
            f"modules_to_save: {path} is quantised ({quantised[0]}) and cannot be trained whole; "
            "load it unquantised (llm_int8_skip_modules) or give it an adapter"
        )
    if not isinstance(module, ModulesToSaveWrapper) and any(True for _ in adapted(module)):
        raise UnsupportedError(
            f"modules_to_save: {path} holds layers with adapters and cannot be trained whole"
        )


def _replace(model: nn.Module, path: str, wrapper: Callable[[nn.Module], Any]) -> Any:
    made = wrapper(model.get_submodule(path))
    put(model, path, made)
    return made


def _place(adapter: Adapter, base: FrozenLayer, autocast: bool, placed: dict[int, Part]) -> None:
    """Parts to the base's device and dtype; half precision is widened when ``autocast`` is on."""
    device, dtype = base.weight.device, base.weight.dtype
    for key, part in adapter.parts.items():
        # a part that layers share is placed once
        if id(part) not in placed:
            made = _to(part, device, dtype, autocast)
            fixed = key in adapter.constant and isinstance(made, nn.Parameter)
            placed[id(part)] = made.detach() if fixed else made  # type: ignore[operator]
        adapter.parts[key] = placed[id(part)]


def _to(part: Part, device: Any, dtype: torch.dtype, autocast: bool) -> Part:
    wide = torch.float32 if autocast and dtype in (torch.float16, torch.bfloat16) else dtype
    if isinstance(part, nn.Module):
        return part.to(device, dtype).to(wide)
    values = part.detach().to(device)
    if values.is_floating_point():
        values = values.to(dtype).to(wide)
    return nn.Parameter(values, part.requires_grad)


def _holds(layer: Any, name: str) -> bool:
    return name in (layer.adapters if isinstance(layer, AdaptedLayer) else layer.modules_to_save)


def _active(model: nn.Module) -> list[str]:
    return next((layer.active_adapters for _, layer in adapted(model) if layer.active_adapters), [])


def low_precision_warning(model: nn.Module, name: str) -> None:
    """Warn once when an adapter would train in half precision."""
    for _, layer in adapted(model):
        if isinstance(layer, AdaptedLayer) and name in layer.adapters:
            for part in layer.parts_of(name).values():
                tensors = [part] if isinstance(part, Tensor) else list(part.parameters())
                for tensor in tensors:
                    if tensor.requires_grad and tensor.dtype in (torch.float16, torch.bfloat16):
                        _warn_low_precision(name, tensor.dtype)
                        return


def _warn_low_precision(adapter: str, dtype: torch.dtype) -> None:
    """Half-precision parameters lose small updates: 2e-5 steps on N(0, 0.02) weights are rounded
    away in 70 % of the entries of a bf16 tensor."""
    warnings.warn(
        f"adapter {adapter!r} trains in {dtype}: small updates are rounded away; keep "
        "autocast_adapter_dtype=True to train it in float32",
        FastAdaptWarning,
        stacklevel=3,
    )
