# SPDX-License-Identifier: Apache-2.0
"""An adapter whose start took a part out of the base, as one that stands on the untouched base.

    W_res + s B A,  W_res = W - s B0 A0    =    W + s [B, -B0] [A; A0]

so that its rank doubles and its scale stays. A0 and B0 come from a copy saved before training.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from fastadapt.adapter_file import open_adapter
from fastadapt.config import AdapterConfig
from fastadapt.errors import CheckpointError, ConfigError, FastAdaptWarning, UnsupportedError

_STARTS = ("pissa", "corda", "olora", "lora_ga", "true")


def on_untouched_base(
    config: Any, tensors: dict[str, Tensor], initial: str | os.PathLike[str]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """(config, tensors) with twice the rank. initial: the folder of the adapter as it started.

    Raises ConfigError for rsLoRA with patterns, which have one alpha a pattern and no factor that
    keeps every scale; UnsupportedError for LoftQ, whose base is no difference of the two;
    CheckpointError for a start that does not fit."""
    start = str(getattr(config, "init_lora_weights", None)).lower()
    if start == "loftq":
        raise UnsupportedError(
            "path_initial_model_for_weight_conversion: LoftQ leaves a quantised weight in the "
            "base, which no pair of rank 2 r turns back"
        )
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ConfigError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not "
            "supported when using `rank_pattern` or `alpha_pattern` at the same time as "
            "`use_rslora=True`."
        )
    if not start.startswith(_STARTS):
        warnings.warn(
            "`path_initial_model_for_weight_conversion` only works for converting a "
            "PiSSA/CorDA/OLoRA/LoRA-GA adapter to a LoRA adapter",
            FastAdaptWarning,
            stacklevel=4,
        )
    opened = open_adapter(initial)
    first = dict(opened.read(list(opened.shapes)))
    made = {}
    for key, tensor in tensors.items():
        dim = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}.get(
            _part(key)
        )
        if dim is None or key.endswith(".bias"):
            made[key] = tensor
            continue
        if key not in first or first[key].shape != tensor.shape:
            raise CheckpointError(
                f"{initial}: expected {key} of {tuple(tensor.shape)}, the adapter before training, "
                f"got {tuple(first[key].shape) if key in first else 'none'}"
            )
        old = first[key].to(tensor)
        made[key] = torch.cat([tensor, old if dim == 0 else -old], dim)
    factor = 2**0.5 if config.use_rslora else 2
    new: AdapterConfig = dataclasses.replace(
        copy.copy(config), init_lora_weights=True, r=2 * config.r,
        lora_alpha=config.lora_alpha * factor,
        rank_pattern={k: 2 * v for k, v in config.rank_pattern.items()},
        alpha_pattern={k: 2 * v for k, v in config.alpha_pattern.items()},
    )  # fmt: skip
    return new, made


def _part(key: str) -> str:
    """The last name of a part in a key: lora_A of ``q_proj.lora_A.weight``."""
    parts = [p for p in key.split(".") if p.startswith("lora_")]
    return parts[-1] if parts else ""
