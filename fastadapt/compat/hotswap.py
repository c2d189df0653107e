# SPDX-License-Identifier: Apache-2.0
"""Put another LoRA adapter's values in the place of one that is loaded, also in a compiled model.

``prepare_model_for_compiled_hotswap`` pads every pair to one rank and fixes the layers' scales:
from then on a swap writes B * (new scale / fixed scale), so that neither shapes nor constants of
the compiled graph change.
"""

from __future__ import annotations

import math
import warnings
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.compat.adapters import get_pattern_key, load_peft_weights
from fastadapt.config import PeftConfig
from fastadapt.errors import CheckpointError, ConfigError, LifecycleError, UnsupportedError
from fastadapt.layer import AdaptedLayer

_MUST_AGREE = (
    "use_rslora", "lora_dropout", "alpha_pattern", "use_dora",
)  # fmt: skip
_FIXED = "_scale_is_fixed"


def prepare_model_for_compiled_hotswap(
    model: Any,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: str = "error",
) -> None:
    """Call it after loading the first adapter and before compiling.

    target_rank: the largest rank among the adapters to come; config: its ``r`` becomes that.
    Raises LifecycleError for a compiled model (check_compiled="error") and one without LoRA."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False):
        if check_compiled == "error":
            raise LifecycleError(
                "Call prepare_model_for_compiled_hotswap *before* compiling the model"
            )
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already "
                "compiled. This will likely result in re-compilation, hurting performance. Call "
                "the function before compiling the model.",
                stacklevel=2,
            )
        elif check_compiled != "ignore":
            raise ConfigError(
                "check_compiles should be one of 'error', 'warn', or 'ignore', got "
                f"'{check_compiled}' instead."
            )
    layers: list[Any] = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    layers = [layer for layer in layers if hasattr(layer, "lora_A")]
    if not layers:
        raise LifecycleError(
            "No adapter layers found on the model, make sure call "
            "`prepare_model_for_compiled_hotswap` after loading the first adapter and before "
            "loading the second adapter."
        )
    for layer in layers:
        setattr(layer, _FIXED, True)
        for name in layer.lora_A if target_rank is not None else ():
            _pad(layer.lora_A[name], int(target_rank or 0), 0)
            _pad(layer.lora_B[name], int(target_rank or 0), 1)
    if config and target_rank is not None:
        for one in config.values() if isinstance(config, dict) else [config]:
            one.r = target_rank
            for key in one.rank_pattern or {}:
                one.rank_pattern[key] = target_rank


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the adapter ``adapter_name`` by one from a folder or hub repository.

    Raises LifecycleError for configs that differ in more than rank, alpha and targets, and
    CheckpointError (a RuntimeError) for layers that the loaded adapter does not have."""
    old: Any = getattr(model, "peft_config")[adapter_name]  # noqa: B009 - not on nn.Module's type
    new = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    check_hotswap_configs_compatible(old, new)
    tensors = load_peft_weights(model_name_or_path, device=torch_device, **kwargs)
    named = {}
    for key, tensor in tensors.items():
        head, dot, leaf = key.rpartition(".")
        bare = key.endswith(("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"))
        named[f"{key}.{adapter_name}" if bare else f"{head}.{adapter_name}{dot}{leaf}"] = tensor
    hotswap_adapter_from_state_dict(model, named, adapter_name, new)


def hotswap_adapter_from_state_dict(
    model: Any,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """The same with tensors at hand, keyed as in the model's own state dict; nothing is written
    when one key is unknown. Parts that they lack are set to zero."""
    layers = {p: m for p, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    if any(adapter_name in m.merged_adapters for m in layers.values()):
        raise LifecycleError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the "
            "base weights. Please unmerge the adapter first by calling "
            "`peft_model.unmerge_adapter()`."
        )
    own = {k.removeprefix("_orig_mod.") for k in model.state_dict()
           if parameter_prefix in k and adapter_name in k.split(".")}  # fmt: skip
    unknown = [k for k in state_dict if k not in own]
    if unknown:
        raise CheckpointError(
            "Hot swapping the adapter did not succeed, unexpected keys found: "
            f"{', '.join(unknown)}."
        )
    with torch.no_grad():
        for key in own - state_dict.keys():
            attrgetter(key)(model).zero_()
        scaled: set[int] = set()
        for key, tensor in state_dict.items():
            path = key.partition(f".{parameter_prefix}")[0]
            layer: Any = model.get_submodule(path)
            wanted = _scale(config, key)
            if getattr(layer, _FIXED, False):
                if ".lora_B." in key or ".lora_embedding_B." in key:
                    tensor = tensor * (wanted / layer.scaling[adapter_name])
            elif id(layer) not in scaled:
                layer.scaling[adapter_name] = wanted
                scaled.add(id(layer))
            _write(attrgetter(key)(model), tensor, key)


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Raise LifecycleError (a ValueError) for two configs whose values cannot be swapped."""
    types = [str(getattr(c.peft_type, "value", c.peft_type)) for c in (config0, config1)]
    if types[0] != types[1]:
        raise LifecycleError(f"Incompatible PEFT types found: {types[0]} and {types[1]}")
    if types[0] != "LORA":
        raise LifecycleError(f"Hotswapping only supports LORA but {types[0]} was passed.")
    for key in _MUST_AGREE:
        values = [getattr(c, key, None) for c in (config0, config1)]
        if values[0] != values[1]:
            raise LifecycleError(f"Configs are incompatible: for {key}, {values[0]} != {values[1]}")


def _scale(config: Any, key: str) -> float:
    path = key.partition(".lora_")[0]
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _write(old: Tensor, new: Tensor, key: str) -> None:
    new = new.to(old.device, old.dtype)
    if old.shape == new.shape:
        old.copy_(new)
    elif all(o >= n for o, n in zip(old.shape, new.shape, strict=True)):
        old.zero_()
        old[tuple(slice(n) for n in new.shape)] = new
    elif all(o == n or d < 2 for d, (o, n) in enumerate(zip(old.shape, new.shape, strict=True))):
        old.data = new.clone()
    else:
        raise UnsupportedError(
            f"Incompatible shapes found for LoRA weights {key}: {tuple(old.shape)} vs "
            f"{tuple(new.shape)}. Please ensure that all ranks are padded to the largest rank "
            "among all LoRA adapters by using prepare_model_for_compiled_hotswap."
        )


def _pad(module: Any, rank: int, dim: int) -> None:
    weight = module.weight
    have = weight.shape[dim]
    if have > rank:
        raise LifecycleError(
            f"Trying to pad the adapter to the target rank {rank}, but the original rank is "
            f"larger ({have})"
        )
    if getattr(module, "groups", 1) > 1:
        raise UnsupportedError("padding LoRA on a convolution with groups: not built yet")
    shape = [rank if d == dim else n for d, n in enumerate(weight.shape)]
    padded = weight.new_zeros(shape)
    with torch.no_grad():
        padded[tuple(slice(n) for n in weight.shape)] = weight
    module.weight = nn.Parameter(padded, requires_grad=weight.requires_grad)
