# SPDX-License-Identifier: Apache-2.0
"""A saved adapter, the ways to load one, and what a refused load must leave alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastadapt
from fastadapt.errors import (
    FastAdaptError,
    FastAdaptWarning,
)
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

TENSORS, CONFIG, BIN = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def fresh(door: Any = fastadapt.patch, **fields: Any) -> Any:
    config = fastadapt.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **fields})
    return door(tiny.model(), config).eval()


def adapted(door: Any = fastadapt.patch, **fields: Any) -> Any:
    model = fresh(door, **fields)
    tiny.randomise(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batch()).logits  # type: ignore[no-any-return]


def from_wrapper(model: Any, folder: Path, **options: Any) -> Any:
    return fastadapt.PeftModel.from_pretrained(model, folder, **options)


def into_new_name(model: Any, folder: Path, **options: Any) -> Any:
    model.load_adapter(folder, "loaded", **options)
    return model


def into_same_name(model: Any, folder: Path, **options: Any) -> Any:
    model.load_adapter(folder, "default", **options)
    return model


LOADERS = {
    "from_pretrained": (tiny.model, from_wrapper),
    "load_adapter": (fresh, into_new_name),
    "load_into": (fresh, into_same_name),
}
"""The ways in: what to start with, how to load."""


def refused(folder: Path, error: type[Exception], *says: str) -> None:
    """By every way in: one error, no model changed, no warning on top."""
    for start, load in LOADERS.values():
        model = start()
        before, configs = tiny.snapshot(model), _configs(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FastAdaptWarning)
            warnings.filterwarnings("ignore", ".*is a pickle")
            with pytest.raises(error) as caught:
                load(model, folder)
        assert isinstance(caught.value, FastAdaptError)
        for text in says:
            assert text in str(caught.value)
        tiny.assert_same(model, before)
        assert _configs(model) == configs


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a file; its metadata stay."""
    with safe_open(folder / TENSORS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata=metadata)


def _configs(model: Any) -> Any:
    return {n: c.to_dict() for n, c in getattr(model, "peft_config", {}).items()}
