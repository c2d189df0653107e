# SPDX-License-Identifier: Apache-2.0
"""Adapters to files: each whole or not at all, the tensors with their config (``adapter_file``)."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import inject, slots
from fastadapt.adapter_file import (
    BASE_KEY,
    BIN_NAME,
    CONFIG_KEY,
    SAFETENSORS_NAME,
    file_digest,
    staged_name,
)
from fastadapt.config import CONFIG_NAME, AdapterConfig
from fastadapt.errors import CheckpointError, OutputError
from fastadapt.files import fetch, locked, write_atomic
from fastadapt.fingerprint import fingerprint

_SHOWN = 12

Converter = Callable[[Any, dict[str, Tensor]], tuple[AdapterConfig, dict[str, Tensor]]]


def adapter_state_dict(
    root: nn.Module,
    config: AdapterConfig,
    name: str,
    *,
    state_dict: dict[str, Tensor] | None = None,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys. ``state_dict``: gathered elsewhere (FSDP,
    DeepSpeed), with the model's own keys or the wrapper's."""
    places = slots.existing(root, config, name)
    own = slots.adapted_paths(root, name)
    pairs = inject.adapters_of(root, name)
    own = {p for p in own if pairs[p].adds_embedding_to_file}
    targeted = any(p.rpartition(".")[2] in slots.EMBEDDINGS for p in own)
    if save_embedding_layers == "auto":
        why = "embedding layers found in `target_modules`" if targeted else _resized(root, config)
        if why:
            warnings.warn(f"Setting `save_embedding_layers` to `True` as {why}.", stacklevel=3)
        save_embedding_layers = bool(why)
    if save_embedding_layers:
        adapted = slots.adapted_paths(root)
        found = slots.embeddings(root, adapted)
        # PEFT's rule: with an adapter on an embedding, only embeddings with adapters are saved
        places.update({k: s for k, s in found.items() if not targeted or ".base_layer." in k})
    if state_dict is None:
        return {k: slot.filed(slot.tensor.detach()) for k, slot in places.items()}
    gathered = {k.replace("_fsdp_wrapped_module.", "").removeprefix("_orig_mod.")
                .removeprefix(slots.PREFIX): v for k, v in state_dict.items()}  # fmt: skip
    absent = [slot.live for slot in places.values() if slot.live not in gathered]
    if absent:
        raise CheckpointError(f"the state dict given lacks {absent[:3]} (of {len(absent)})")
    return {k: slot.filed(gathered[slot.live].detach()) for k, slot in places.items()}


def save(
    root: nn.Module,
    configs: dict[str, AdapterConfig],
    folder: str | os.PathLike[str],
    *,
    safe_serialization: bool = True,
    convert: Converter | None = None,
    **options: Any,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json, each whole or not at all, of every
    adapter in ``configs``: "default" into the folder, others into a subfolder of their name. All
    are checked before the first is written. convert: makes what is written of a config and its
    tensors; options: see ``adapter_state_dict``.

    Raises CheckpointError for an adapter that is empty or not finite, OutputError for a folder
    that cannot be written; files that were there then stand."""
    held = {n: adapter_state_dict(root, c, n, **options) for n, c in configs.items()}
    if convert is not None:
        made = {n: convert(configs[n], tensors) for n, tensors in held.items()}
        configs, held = {n: c for n, (c, _) in made.items()}, {n: t for n, (_, t) in made.items()}
    for name, tensors in held.items():
        _refuse(tensors, name)
    for name, tensors in held.items():
        where = Path(folder) if name == "default" else Path(folder) / name
        write_folder(root, configs[name], tensors, where, safe_serialization)


def write_folder(
    root: nn.Module,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    folder: Path,
    safe_serialization: bool = True,
) -> None:
    """One adapter's tensors, under the keys of files, and its configuration."""
    if folder.is_file():
        raise OutputError(f"expected a directory to save to, got the file {folder}")
    ready = {k: t.to("cpu").contiguous().clone() for k, t in tensors.items()}
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    text = config.to_json(inference_mode=True, auto_mapping=mapping).encode()
    digest = hashlib.sha256(text).hexdigest()[:16]
    metadata = {"format": "pt", BASE_KEY: fingerprint(root), CONFIG_KEY: digest}

    def write(path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            if safe_serialization:
                save_file(ready, path, metadata=metadata)
            else:
                torch.save(ready, path)
        except (SafetensorError, RuntimeError) as error:
            # what these libraries make of a full disk
            raise OSError(str(error)) from error

    def stage(path: Path) -> None:
        """Just before the tensors take their name: the config that they go with."""
        staged.append(folder / staged_name(digest if safe_serialization else file_digest(path)))
        write_atomic(staged[0], text)

    staged: list[Path] = []
    with locked(folder):
        name = SAFETENSORS_NAME if safe_serialization else BIN_NAME
        try:
            write_atomic(folder / name, write, before=stage)
        except BaseException:
            for left in staged:
                left.unlink(missing_ok=True)
            raise
        if not safe_serialization:
            # readers take the safetensors file first: an old one would hide the new values
            (folder / SAFETENSORS_NAME).unlink(missing_ok=True)
        staged[0].replace(folder / CONFIG_NAME)
        for left in folder.glob(staged_name("*")):
            left.unlink(missing_ok=True)


def _refuse(tensors: dict[str, Tensor], name: str) -> None:
    if not tensors or not any(t.numel() for t in tensors.values()):
        raise CheckpointError(
            f"adapter {name!r} has no values to save: were its parameters gathered (ZeRO-3, FSDP)?"
        )
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"adapter {name!r} is not saved, its values are not finite: {', '.join(bad[:_SHOWN])}"
        )


def _resized(root: nn.Module, config: AdapterConfig) -> str:
    """Words that say so when the vocabulary is not the one of the base's files; never asks the
    network."""
    size = getattr(getattr(root, "config", None), "vocab_size", None)
    where = config.base_model_name_or_path
    path = fetch(where, "config.json", local_files_only=True) if size and where else None
    if path is None or json.loads(path.read_bytes()).get("vocab_size", size) == size:
        return ""
    return "the embedding layer has been resized during finetuning"
