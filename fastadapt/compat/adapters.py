# SPDX-License-Identifier: Apache-2.0
"""Adapters of a model without a wrapper: inject, state dicts in and out, activate, delete, cast.

Each function takes a PeftModel, its ``base_model``, a patched model, or a plain model into which
``inject_adapter_in_model`` put adapters.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt import checkpoint, inject, penalties, saving, slots, targets
from fastadapt.adapter_file import AdapterFile, open_adapter
from fastadapt.base import hold_weights
from fastadapt.config import AdapterConfig, as_config, from_dict
from fastadapt.errors import (
    CheckpointError,
    ConfigError,
    LifecycleError,
    TargetError,
    UnsupportedError,
)
from fastadapt.hollow import hollow, materialise
from fastadapt.layer import AdaptedLayer
from fastadapt.methods import method_of
from fastadapt.model import Adapters
from fastadapt.modules_to_save import ModulesToSaveWrapper


class LoadResult(NamedTuple):
    """What ``set_peft_model_state_dict`` did not find, and what it did not know."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into ``model`` in place and return it, without a wrapper. One of this name
    starts anew.

    state_dict: the layers that it names are the targets, whatever the config says.
    low_cpu_mem_usage: parameters on the meta device, until a state dict is set."""
    config = as_config(peft_config)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ConfigError(
            "`create_and_replace` does not support prompt learning and adaption prompt yet."
        )
    if state_dict is not None:
        config = _targeting(model, config, state_dict)
    made = inject.plan(model, config)
    inject.clear(model, made, adapter_name)
    inject.attach(model, made, adapter_name)
    if low_cpu_mem_usage:
        hollow(model, adapter_name)
    held: Any = model
    known = held.__dict__.get("peft_config", {})
    held.peft_config = {**known, adapter_name: made.config}
    penalties.attach(model, adapter_name, made)
    return model


def get_peft_model_state_dict(
    model: Any,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors under the keys of PEFT's files; of an injected model under its own."""
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    if state_dict is None and _is_sharded(model):
        state_dict = model.state_dict()
    model = _bare(model)
    found = saving.adapter_state_dict(
        root_of(model), _config(model, adapter_name), adapter_name,
        state_dict=state_dict, save_embedding_layers=save_embedding_layers,
    )  # fmt: skip
    return {_shown(model, key): tensor for key, tensor in found.items()}


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy tensors into an adapter of the model.

    Raises CheckpointError (a RuntimeError) for a shape that differs, unless
    ``ignore_mismatched_sizes``, which warns and leaves that tensor as it is."""
    model = _bare(model)
    root, config = root_of(model), _config(model, adapter_name)
    if low_cpu_mem_usage:
        materialise(root, adapter_name)
        hold_weights(root)
    own = slots.existing(root, config, adapter_name)
    # keys of the whole adapter (VeRA's projections) have no path of a module, injected or not
    whole = {k for k in own if not k.startswith(slots.PREFIX)}
    prefix = "" if wrapped(model) else slots.PREFIX
    given = {k if k in whole else prefix + k: v for k, v in peft_model_state_dict.items()}
    shapes = {k: tuple(v.shape) for k, v in given.items()}
    file = AdapterFile(config, Path("state_dict"), shapes, {}, given)
    adapted = slots.adapted_paths(root)
    known = {**slots.biases(root, adapted), **slots.embeddings(root, adapted), **own}
    misshapen = [
        k for k, v in file.held.items()
        if k in known and tuple(known[k].filed(known[k].tensor.detach()).shape) != tuple(v.shape)
    ]  # fmt: skip
    if misshapen:
        text = "\n".join(
            f"size mismatch for {_shown(model, k)}: expected {tuple(known[k].tensor.shape)}, got "
            f"{tuple(file.held[k].shape)}" for k in misshapen
        )  # fmt: skip
        if not ignore_mismatched_sizes:
            raise CheckpointError(text)
        warnings.warn(
            "Some weights of the state_dict were not loaded since they are of the wrong shape and "
            f"`ignore_mismatched_sizes` was passed:\n{text}", stacklevel=2,
        )  # fmt: skip
    unexpected = [k for k in file.held if k not in known]
    missing = [k for k in own if k not in file.held]
    file.held = {k: v for k, v in file.held.items() if k in known and k not in misshapen}
    checkpoint.fill(root, file, adapter_name)
    return LoadResult([_shown(model, k) for k in missing], [_shown(model, k) for k in unexpected])


def load_peft_weights(
    model_id: Any,
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    **where: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file, under its keys. key_mapping: pattern -> replacement."""
    file = open_adapter(model_id, **where)
    tensors = file.read(list(file.shapes))
    for pattern, new in (key_mapping or {}).items():
        tensors = {re.sub(pattern, new, k): v for k, v in tensors.items()}
    return {k: v.to(device or "cpu") for k, v in tensors.items()}


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base's tensors under the names that they had before adapters were added."""
    return {new: tensor for new, _, tensor in _base_entries(root_of(model))}


def set_base_model_state_dict(
    model: Any, state_dict: dict[str, Tensor], strict: bool = True
) -> LoadResult:
    """Copy tensors into the base. Raises RuntimeError when names differ, unless not ``strict``."""
    root = root_of(model)
    names = {new: old for new, old, _ in _base_entries(root)}
    missing = [k for k in names if k not in state_dict]
    unexpected = [k for k in state_dict if k not in names]
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"Error(s) in loading state_dict: Missing key(s): {missing}; Unexpected key(s): "
            f"{unexpected}"
        )
    root.load_state_dict({names[k]: v for k, v in state_dict.items() if k in names}, strict=False)
    return LoadResult(missing, unexpected)


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: Any = AdaptedLayer,
) -> None:
    """Make adapters active in every layer of ``layer_cls``, and trainable."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter(adapter_name, inference_mode)
        elif isinstance(module, AdaptedLayer) and isinstance(module, layer_cls):
            if module.merged:
                warnings.warn(
                    "Adapter cannot be set when the model is merged. Unmerging the model first.",
                    stacklevel=2,
                )
                module.unmerge()
            module.set_adapter(adapter_name, inference_mode)


_set_adapter = set_adapter


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = AdaptedLayer
) -> list[str] | None:
    """Remove an adapter from every layer; the adapters that are active after that, or None."""
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer | ModulesToSaveWrapper)]
    merged = [m for m in layers if adapter_name in m.merged_adapters]
    if merged:
        raise LifecycleError(
            f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them "
            "first."
        )
    left: list[str] | None = None
    for layer in layers:
        layer.delete_adapter(adapter_name)
        if left is None and isinstance(layer, AdaptedLayer):
            left = layer.active_adapters
    return left


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Freeze or train adapters in every layer."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer | ModulesToSaveWrapper):
            module.set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(
    model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True
) -> None:
    """Widen the floating-point parameters of an adapter that are narrower than float32."""
    if not autocast_adapter_dtype:
        return
    for layer in _layers(model):
        for part in layer.parts_of(adapter_name).values():
            tensors = [part] if isinstance(part, Tensor) else list(part.parameters())
            for tensor in tensors:
                if tensor.is_floating_point() and tensor.element_size() < 4:
                    tensor.data = tensor.data.float()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Trainable parameters in float32, frozen ones in ``dtype``."""
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """{"matched": paths with the adapter, "unmatched": the others}."""
    root = root_of(tuner)
    matched = list(inject.adapters_of(root, adapter_name))
    return {"matched": matched,
            "unmatched": [p for p, _ in targets.walk(root) if p and p not in matched]}  # fmt: skip


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether the config takes a module of this path."""
    return bool(targets.select(config, {key: nn.Identity()}))


def get_peft_config(config_dict: dict[str, Any]) -> AdapterConfig:
    """A configuration from a dict with a ``peft_type``."""
    return from_dict(config_dict)


def get_pattern_key(pattern_keys: Any, key_to_match: str) -> str:
    """The first pattern that matches the end of a path, or the path itself."""
    found = (p for p in pattern_keys if re.match(rf"(.*\.)?({p})$", key_to_match))
    return next(found, key_to_match)


def infer_device() -> str:
    """The accelerator that is there, or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight, transposed when it is stored (in, out)."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def shift_tokens_right(
    input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int
) -> Tensor:
    """The decoder's inputs for these labels: one to the right, -100 replaced by padding."""
    if pad_token_id is None:
        raise ConfigError("self.model.config.pad_token_id has to be defined.")
    shifted = torch.cat(
        [torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], 1
    )
    return shifted.masked_fill(shifted == -100, pad_token_id)


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What is equal for two tensors on one storage."""
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


def str_to_bool(value: str) -> int:
    """1 for "yes", "true", "1" and their like, 0 for "no", ..."""
    text = value.lower()
    if text in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if text in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ConfigError(f"invalid truth value {value}")


def match_target_against_key(target_pattern: str, key: str) -> Any:
    """The full match of a pattern, or None."""
    return re.fullmatch(target_pattern, key)


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, its name) of a path."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    for name, parameter in model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad = False


def root_of(model: Any) -> nn.Module:
    """The module whose paths are those of the base model."""
    return model.adapter_root if isinstance(model, Adapters) else model


def _is_sharded(model: Any) -> bool:
    return "_fsdp_wrapped_module" in getattr(model, "_modules", {})


def _bare(model: Any) -> Any:
    """The model in FSDP's wrapper."""
    return model.module if _is_sharded(model) else model


def wrapped(model: Any) -> bool:
    """Keys of the model start as those of files do."""
    return isinstance(model, Adapters) and model.adapter_root is not model


def _shown(model: Any, key: str) -> str:
    return key if wrapped(model) else key.removeprefix(slots.PREFIX)


def _config(model: Any, name: str) -> AdapterConfig:
    configs = getattr(model, "peft_config", None) or {}
    if name not in configs:
        raise LifecycleError(f"Adapter {name} not found; there are {list(configs)}")
    found: AdapterConfig = configs[name]
    return found


def _layers(model: Any) -> list[AdaptedLayer]:
    return [m for m in root_of(model).modules() if isinstance(m, AdaptedLayer)]


def _targeting(model: nn.Module, config: Any, state_dict: dict[str, Tensor]) -> AdapterConfig:
    """The config with the layers that a state dict names as its targets."""
    prefix = method_of(config.peft_type).prefix
    paths = {
        k.removeprefix(slots.PREFIX).partition(f".{prefix}")[0]
        for k in state_dict if f".{prefix}" in k
    }  # fmt: skip
    found = [p for p, _ in targets.walk(model) if p in paths]
    if not found:
        raise UnsupportedError(
            f"state_dict: no key has the form <path of a module>.{prefix}...; got "
            f"{list(state_dict)[:3]}"
        )
    try:
        wanted = inject.plan(model, config, meta=True).adapters
    except TargetError:
        wanted = {}
    if wanted and set(wanted) != set(found):
        text = (
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT "
            "config and the provided state_dict. This is not necessarily an issue and can be "
            "ignored if this was the intent. "
        )
        for what, extra in (("PEFT config", set(wanted) - set(found)),
                            ("state_dict", set(found) - set(wanted))):  # fmt: skip
            if extra:
                text += f"The {what} contained these additional target modules: {sorted(extra)}. "
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    exact = "|".join(re.escape(p) for p in found)
    new: AdapterConfig = dataclasses.replace(
        config, target_modules=f"(?:{exact})", exclude_modules=None, layers_to_transform=None,
        layers_pattern=None,
    )  # fmt: skip
    return new


def _base_entries(root: nn.Module) -> list[tuple[str, str, Tensor]]:
    """(name without adapters, key in the state dict, tensor) of what belongs to the base."""
    inner: list[tuple[str, str]] = []
    for path, layer in inject.adapted(root):
        leaf = "base_layer" if isinstance(layer, AdaptedLayer) else "original_module"
        inner.append((f"{path}.", f"{path}.{leaf}."))
    found = []
    for key, tensor in root.state_dict().items():
        owner = next(((p, b) for p, b in reversed(inner) if key.startswith(p)), None)
        if owner is None:
            found.append((key, key, tensor))
        elif key.startswith(owner[1]):
            found.append((owner[0] + key.removeprefix(owner[1]), key, tensor))
    return found
