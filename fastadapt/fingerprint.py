# SPDX-License-Identifier: Apache-2.0
"""Which base an adapter was trained on, small enough for a file's metadata.

The architecture's numbers, and 64 embedding values: they stay dense in a quantised model, and
their first rows survive a resized vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

_VALUES = 64
_SAME = 0.98


def fingerprint(model: nn.Module) -> str:
    """Json text: model type, sizes, sampled embedding values."""
    config: Any = getattr(model, "config", None)
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    facts = {n: getattr(config, n) for n in names if getattr(config, n, None) is not None}
    return json.dumps({**facts, "embedding": _sample(model)})


def differences(recorded: str, model: nn.Module) -> list[str]:
    """What speaks against the model being the recorded base; empty when nothing does."""
    try:
        old, new = json.loads(recorded), json.loads(fingerprint(model))
        sample = torch.tensor(old.pop("embedding"), dtype=torch.float64)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    found = [
        f"wrong base: {key} is {new.get(key)}, the adapter was trained on {value}"
        for key, value in old.items()
        if key != "vocab_size" and new.get(key) != value
    ]
    ours = torch.tensor(new["embedding"], dtype=torch.float64)
    if not found and sample.shape == ours.shape and sample.numel():
        alike = torch.nn.functional.cosine_similarity(sample, ours, dim=0).item()
        if alike < _SAME:
            found.append(
                f"wrong base: the embeddings are others than those of the adapter's base (cosine "
                f"{alike:.2f} of sampled values)"
            )
    return found


def _sample(model: nn.Module) -> list[float]:
    if not hasattr(model, "get_input_embeddings"):
        return []
    try:
        layer: Any = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return []
    for inner in ("base_layer", "original_module"):
        layer = getattr(layer, inner, layer)
    weight = getattr(layer, "weight", None)
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
        return []
    rows = weight.detach()[:_VALUES, : _VALUES // 8].float().flatten()
    step = max(1, rows.numel() // _VALUES)
    return [round(v, 6) for v in rows[::step][:_VALUES].tolist()]
