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
    layers = [m for m in layers if hasattr(m, "lora_A") or hasattr(m, "lora_embedding_A")]
    if not layers:
        raise LifecycleError(
            "No adapter layers found on the model, make sure call "
            "`prepare_model_for_compiled_hotswap` after loading the first adapter and before "
            "loading the second adapter."
        )
    for layer in layers:
        if target_rank is not None:
            _refuse_rank(layer, target_rank)
    for layer in layers:
        setattr(layer, _FIXED, True)
        for name, (a, b) in _pairs(layer).items():
            if layer.scaling[name] == 0:
                # a scale of zero stays zero whatever B is multiplied by
                layer.scaling[name] = 1.0
                b.data = torch.zeros_like(b)
            if target_rank is not None:
                groups = _groups(layer, name)
                _pad(layer, "A", name, _widened(a, target_rank, 0, groups))
                _pad(layer, "B", name, _widened(b, target_rank // groups, 1))
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
        if key.endswith("lora_magnitude_vector"):
            named[f"{key}.{adapter_name}.weight"] = tensor
            continue
        bare = key.endswith(("lora_embedding_A", "lora_embedding_B"))
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
            groups = _groups(layer, adapter_name) if ".lora_A." in key else 1
            _write(attrgetter(key)(model), tensor, key, groups)


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


def _write(old: Tensor, new: Tensor, key: str, groups: int = 1) -> None:
    new = new.to(old.device, old.dtype)
    if old.shape == new.shape:
        old.copy_(new)
    elif all(o >= n for o, n in zip(old.shape, new.shape, strict=True)):
        _fill(old, new, groups)
    elif all(o == n or d < 2 for d, (o, n) in enumerate(zip(old.shape, new.shape, strict=True))):
        old.data = new.clone()
    else:
        raise UnsupportedError(
            f"Incompatible shapes found for LoRA weights {key}: {tuple(old.shape)} vs "
            f"{tuple(new.shape)}. Please ensure that all ranks are padded to the largest rank "
            "among all LoRA adapters by using prepare_model_for_compiled_hotswap."
        )


def _fill(old: Tensor, new: Tensor, groups: int) -> None:
    """``new`` in the corner of ``old``, zeros elsewhere. groups: rows of A of a grouped
    convolution belong to groups of B, each of which has a corner of its own."""
    old.zero_()
    if groups > 1:
        old, new = (t.view(groups, -1, *t.shape[1:]) for t in (old, new))
    old[tuple(slice(n) for n in new.shape)] = new


def _pairs(layer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """adapter -> its A and B."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for kind in ("lora_", "lora_embedding_"):
        a, b = (getattr(layer, f"{kind}{side}", {}) for side in "AB")
        for name in a:
            pair = a[name], b[name]
            found[name] = tuple(getattr(p, "weight", p) for p in pair)
    return found


def _groups(layer: Any, name: str) -> int:
    holder = getattr(layer, "lora_B", {})
    return int(getattr(holder[name], "groups", 1)) if name in holder else 1


def _refuse_rank(layer: Any, rank: int) -> None:
    for name, (a, _) in _pairs(layer).items():
        if a.shape[0] > rank:
            raise LifecycleError(
                f"Trying to pad the adapter to the target rank {rank}, but the original rank is "
                f"larger ({a.shape[0]})"
            )
        if rank % _groups(layer, name):
            raise UnsupportedError(
                f"target_rank: expected a multiple of the convolution's {_groups(layer, name)} "
                f"groups, got {rank}"
            )


def _widened(tensor: Tensor, size: int, dim: int, groups: int = 1) -> Tensor:
    shape = [size if d == dim else n for d, n in enumerate(tensor.shape)]
    padded = tensor.new_zeros(shape)
    with torch.no_grad():
        _fill(padded, tensor, groups)
    return padded


def _pad(layer: Any, side: str, name: str, values: Tensor) -> None:
    """Put a wider parameter in the place of one side of a pair."""
    linear = name in getattr(layer, "lora_A", {})
    holder = getattr(layer, f"lora_{side}" if linear else f"lora_embedding_{side}")
    if not linear:
        holder[name] = nn.Parameter(values, requires_grad=holder[name].requires_grad)
        return
    module = holder[name]
    module.weight = nn.Parameter(values, requires_grad=module.weight.requires_grad)
    for size in ("out_features", "out_channels") if side == "A" else ("in_features", "in_channels"):
        if hasattr(module, size):
            setattr(module, size, values.shape[0] if side == "A" else values.shape[1] * _groups(
                layer, name))  # fmt: skip
