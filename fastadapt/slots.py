# SPDX-License-Identifier: Apache-2.0
"""Which key of an adapter file belongs to which tensor of a model.

PEFT's rule: ``base_model.model.<path of the module>.<part>[.<leaf>]``, without the adapter's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

from torch import Tensor, nn

from fastadapt import inject, targets
from fastadapt.adapter import Adapter, Part
from fastadapt.config import AdapterConfig
from fastadapt.layer import AdaptedLayer
from fastadapt.modules_to_save import ModulesToSaveWrapper
from fastadapt.parameter import depth, innermost

PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "lm_head")


class Slot(NamedTuple):
    """live: the key in the model's own state dict; tensor: the parameter or buffer; form: the
    (part, suffix) whose form the file holds, "" for the tensor itself."""

    live: str
    tensor: Tensor
    adapter: Adapter | None = None
    form: tuple[str, str] = ("", "")

    def filed(self, tensor: Tensor) -> Tensor:
        """What a file holds of ``tensor``, the slot's own or its gathered copy."""
        part, suffix = self.form
        if self.adapter is None or not part:
            return tensor
        return self.adapter.file_forms(part)[suffix](tensor)


def planned(root: nn.Module, made: inject.Plan) -> dict[str, Slot]:
    """The keys that a planned adapter will have; live keys are those after it is attached."""
    with nullcontext() if made.layers is None else made.layers.shown():
        return _planned(root, made)


def _planned(root: nn.Module, made: inject.Plan) -> dict[str, Slot]:
    found: dict[str, Slot] = {}
    for path, adapter in made.adapters.items():
        for part, module in adapter.parts.items():
            found.update(_of_part(made.after(path), "", part, module, adapter))
    modules = dict(targets.walk(root))
    for path in made.saved:
        original = getattr(modules[path], "original_module", modules[path])
        for key, tensor in original.state_dict().items():
            found[PREFIX + f"{made.after(path)}.{key}"] = Slot("", tensor)
    mode = getattr(made.config, "bias", "none")
    found.update(_biases(root, mode, set(made.adapters), made))
    return found


def existing(root: nn.Module, config: AdapterConfig, name: str) -> dict[str, Slot]:
    """The keys of an adapter that the model has."""
    found: dict[str, Slot] = {}
    own = set()
    for path, layer in inject.adapted(root):
        if isinstance(layer, AdaptedLayer):
            if name not in layer.adapters:
                continue
            own.add(path)
            for key, part in layer.parts_of(name).items():
                found.update(_of_part(path, name, key, part, layer.adapters[name]))
        elif name in layer.modules_to_save:
            live = f"{path}.modules_to_save.{name}."
            for key, tensor in layer.modules_to_save[name].state_dict().items():
                found[PREFIX + f"{path}.{key}"] = Slot(live + key, tensor)
    found.update(_biases(root, getattr(config, "bias", "none"), own))
    return found


def embeddings(root: nn.Module, adapted: set[str]) -> dict[str, Slot]:
    """The base's input and output embeddings, which a file may hold too; one that is trained whole
    is in ``existing``."""
    found: dict[str, Slot] = {}
    ends = _ends(root)
    for path, module in targets.walk(root):
        if isinstance(module, ModulesToSaveWrapper) or (
            id(module) not in ends if ends else path.rpartition(".")[2] not in EMBEDDINGS
        ):
            continue
        weight = getattr(innermost(module), "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            middle = ".base_layer" * max(depth(module), path in adapted)
            found[PREFIX + f"{path}{middle}.weight"] = Slot(f"{path}{middle}.weight", weight)
    return found


def biases(root: nn.Module, adapted: set[str]) -> dict[str, Slot]:
    """The base's biases, whatever the configuration trains: a state dict may hold them too."""
    return dict(_biases(root, "all", adapted))


def vocabulary(root: nn.Module) -> dict[str, int]:
    """Path -> number of tokens, of the input and the output embedding."""
    found = {}
    ends = _ends(root)
    for path, module in targets.walk(root):
        if id(module) in ends or path.rpartition(".")[2] in EMBEDDINGS:
            inner = getattr(module, "original_module", module)
            weight = getattr(getattr(inner, "base_layer", inner), "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
                found[path] = weight.shape[0]
    return found


def adapted_paths(root: nn.Module, name: str | None = None) -> set[str]:
    """The paths of adapted layers, of all or of one adapter."""
    return {
        p for p, layer in inject.adapted(root)
        if isinstance(layer, AdaptedLayer) and (name is None or name in layer.adapters)
    }  # fmt: skip


def _ends(root: nn.Module) -> set[int]:
    """The ids of the input and the output embedding; empty for a model that does not say."""
    ends = set()
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.add(id(getattr(root, ask)()))
        except (AttributeError, NotImplementedError):
            continue
    return ends - {id(None)}


def _of_part(
    path: str, name: str, part: str, module: Part, adapter: Adapter
) -> Iterator[tuple[str, Slot]]:
    live = f"{path}.{part}.{name}"
    tensors: dict[str, Tensor] = {"": module} if isinstance(module, Tensor) else {}
    if isinstance(module, nn.Module):
        tensors = module.state_dict(keep_vars=True)
    for leaf, tensor in tensors.items():
        key = adapter.file_key(part, leaf)
        if key is None:
            continue
        full = f"base_model.{key[1:]}" if key.startswith("/") else PREFIX + f"{path}.{key}"
        where = f"{live}.{leaf}" if leaf else live
        forms = adapter.file_forms(part)
        for suffix in forms:
            yield full + suffix, Slot(where, tensor, adapter, (part, suffix))
        if not forms:
            yield full, Slot(where, tensor, adapter)


def _biases(
    root: nn.Module, mode: str, only: set[str], made: inject.Plan | None = None
) -> Iterator[tuple[str, Slot]]:
    """The base biases that ``bias="all"`` or "lora_only" trains and saves; made: a plan that is
    not in the model yet."""
    if mode == "none":
        return
    for path, module in targets.walk(root):
        if isinstance(module, ModulesToSaveWrapper):
            continue
        bias = getattr(innermost(module), "bias", None)
        at = path if made is None else made.after(f"{path}.")[:-1]
        if not isinstance(bias, nn.Parameter) or (mode != "all" and not {path, at} & only):
            continue
        planned = made is not None and {path, at} & made.adapters.keys() - made.parameters.keys()
        if planned and depth(module) == 0:
            at += ".base_layer"
        at += ".base_layer" * depth(module)
        yield PREFIX + f"{at}.bias", Slot(f"{at}.bias", bias)
