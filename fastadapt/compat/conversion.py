# SPDX-License-Identifier: Apache-2.0
"""Adapters that add to the weights of linear layers, as LoRAs:  W' - W ~ B A, by a truncated SVD.

B = U_k S_k,  A = V_k^T: the best of rank k in the Frobenius norm; s = 1
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import inject, saving, slots, targets
from fastadapt.compat.adapters import root_of, wrapped
from fastadapt.config import AdapterConfig
from fastadapt.errors import ConfigError, FastAdaptWarning, LifecycleError, ModuleTypeError
from fastadapt.layer import AdaptedLayer
from fastadapt.methods.lora import LoraConfig
from fastadapt.modules_to_save import ModulesToSaveWrapper


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors, under the keys of files, of a LoRA that stands for an
    adapter of the model, which is left alone.

    rank: an integer; or the share of ``||W' - W||^2`` to keep, in (0, 1], for a rank of each
    layer's own; compile_kwargs: for ``torch.compile`` of the SVD.

    Raises TypeError where an adapter does not add to the weight of a linear layer, ValueError for a
    rank that cannot be and for trained biases."""
    _check_rank(rank)
    root, config = root_of(model), _config(model, adapter_name)
    layers = _layers(root, adapter_name)
    if config is not None:
        if str(getattr(config.peft_type, "value", config.peft_type)) == "LORA":
            warnings.warn(
                "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is "
                "typically no need for that.", FastAdaptWarning, stacklevel=2,
            )  # fmt: skip
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise ConfigError(
                f"The adapter's config sets bias={bias}, this is not supported right now."
            )
    factor = _factors if compile_kwargs is None else torch.compile(_factors, **compile_kwargs)
    before = slots.PREFIX if wrapped(model) else ""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, layer in _progress(list(layers.items()), progressbar):
        a, b = _pair(layer, adapter_name, rank, factor)
        ranks[path] = len(a)
        tensors[f"{before}{path}.lora_A.weight"] = a
        tensors[f"{before}{path}.lora_B.weight"] = b
    others = [p for p, _ in targets.walk(root) if p not in ranks]
    whole = isinstance(rank, int)
    made = LoraConfig(
        r=int(rank) if whole else 1, lora_alpha=int(rank) if whole else 1,
        target_modules=targets.shortest(ranks, others),
        rank_pattern={} if whole else ranks, alpha_pattern={} if whole else dict(ranks),
        base_model_name_or_path=getattr(config, "base_model_name_or_path", None),
        task_type=getattr(config, "task_type", None),
    )  # fmt: skip
    if config is not None and config.modules_to_save:
        made.modules_to_save = list(config.modules_to_save)
        for path, module in inject.adapted(root):
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                for leaf, tensor in module.modules_to_save[adapter_name].state_dict().items():
                    tensors[f"{before}{path}.{leaf}"] = tensor
    return made, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """``convert_to_lora`` into a folder, for ``PeftModel.from_pretrained``."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    named = tensors if wrapped(model) else {slots.PREFIX + k: t for k, t in tensors.items()}
    saving.write_folder(root_of(model), config, named, Path(path))


def _check_rank(rank: float) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(
            "If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but "
            f"got {rank}."
        )
    if rank <= 0:
        raise ConfigError(
            f"Passing a rank of {rank} doesn't make sense, please pass a valid value."
        )


def _config(model: Any, name: str) -> AdapterConfig | None:
    found: AdapterConfig | None = (getattr(model, "peft_config", None) or {}).get(name)
    return found


def _layers(root: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    layers = {p: m for p, m in inject.adapted(root) if isinstance(m, AdaptedLayer)}
    layers = {p: m for p, m in layers.items() if name in m.adapters}
    if not layers:
        raise ModuleTypeError("Could not detect any layer that supports LoRA conversion.")
    unfit = {repr(type(m)) for m in layers.values() if not m.supports_lora_conversion(name)}
    if unfit:
        raise ModuleTypeError(
            "Some module types on this model do not support LoRA conversion: "
            f"{', '.join(sorted(unfit))}."
        )
    if any(m.merged for m in layers.values()):
        raise LifecycleError("LoRA conversion reads the base's weights: unmerge the adapters first")
    return layers


def _pair(
    layer: AdaptedLayer, name: str, rank: float, factor: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    parts = layer.parts_of(name).values()
    tensors = [p for part in parts for p in (
        part.parameters() if isinstance(part, nn.Module) else [part])]  # fmt: skip
    dtype = next(t.dtype for t in tensors if t.is_floating_point())
    # in float64, so that what is small beside W keeps its digits
    wide = copy.deepcopy(layer).double()
    with torch.no_grad():
        w, bias = wide.frozen.read()
        new, shifted = wide.adapters[name].merged(w.double(), bias)
        u, s, v = factor((new - w.double()).float())
    if shifted is not None and (bias is None or not torch.equal(shifted, bias.to(shifted.dtype))):
        raise ConfigError("The adapter changes biases, which a LoRA of A and B alone does not.")
    if isinstance(rank, int):
        k = rank
    else:
        energy = s.double().square().cumsum(0)
        k = int(torch.searchsorted(energy, rank * energy[-1])) + 1
        k = min(k, len(s))
    if k > len(s):
        raise ConfigError(
            f"The chosen rank {k} is larger than the weight shape ({len(s)}), please choose a "
            "lower rank."
        )
    return v[:k].to(dtype).contiguous(), (u[:, :k] * s[:k]).to(dtype).contiguous()


def _factors(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return u, s, v


def _progress(items: list[Any], show: bool) -> Any:
    if not show:
        return items
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(items, desc="Converting to LoRA")
