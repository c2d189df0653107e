# SPDX-License-Identifier: Apache-2.0
"""Adapter files in PEFT's layout: written whole or not at all, checked whole before loading.

``open_adapter`` reads the config and the tensors' shapes, ``check`` compares them with the model
and raises one CheckpointError with every problem, ``fill`` copies the tensors in.

A folder's two files are one adapter: the rename of the tensors' file commits a save. The config is
staged beside it first, under its digest, which the tensors' file records; a reader that finds the
staged file knows that the save died after its commit, and takes it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import constants, inject, slots
from fastadapt.config import CONFIG_NAME, AdapterConfig, PeftConfig
from fastadapt.errors import (
    AdapterConfigError,
    CheckpointError,
    ConfigError,
    FastAdaptWarning,
    OutputError,
    TargetError,
)
from fastadapt.files import fetch, locked, write_atomic
from fastadapt.fingerprint import differences, fingerprint
from fastadapt.methods import method_of

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
_BASE = "fastadapt_base"
_CONFIG = "fastadapt_config"
_SHOWN = 12
MAX_HEADER_BYTES = 16 << 20
"""An adapter of 18,000 layers has 6 MB; the format itself allows 100 MB, whose parsing takes
several times that."""

Converter = Callable[[Any, dict[str, Tensor]], tuple[AdapterConfig, dict[str, Tensor]]]


@dataclass
class AdapterFile:
    """An adapter on disk. shapes: key -> shape, keys as PEFT has them now; ``read`` holds the
    tensors that it was asked for."""

    config: AdapterConfig
    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    held: dict[str, Tensor] = field(default_factory=dict)
    old: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keys that an earlier PEFT release gave other names."""
        renamed = method_of(self.config.peft_type).old_parts
        split = {k: k.rpartition(".") for k in self.shapes}
        names = {k: renamed[part] for k, (_, _, part) in split.items() if part in renamed}
        for key in [k for k, name in names.items() if name is None]:
            del self.shapes[key], names[key]
            self.held.pop(key, None)
        self.rename({k: f"{split[k][0]}.{name}" for k, name in names.items()})

    def rename(self, names: dict[str, str]) -> None:
        """Key -> its new name. Raises CheckpointError when two keys would be one."""
        names = {old: new for old, new in names.items() if old != new}
        kept = [k for k in self.shapes if k not in names]
        if len({*kept, *names.values()}) != len(self.shapes):
            raise CheckpointError(f"{self.path}: two tensors have one name after renaming")
        self.shapes = {names.get(k, k): v for k, v in self.shapes.items()}
        self.held = {names.get(k, k): v for k, v in self.held.items()}
        self.old.update({new: self.old.pop(old, old) for old, new in names.items()})

    def read(self, keys: list[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU; kept until the adapter is filled in."""
        if not self.held:
            from safetensors import safe_open

            with safe_open(self.path, framework="pt") as file:
                self.held = {k: file.get_tensor(self.old.get(k, k)) for k in keys}
        self.held = {k: self.held[k] for k in keys}
        return self.held


@dataclass
class LoadReport:
    """What did not fit: PEFT's two lists, and every problem in words."""

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def open_adapter(
    model_id: Any,
    *,
    config: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> AdapterFile:
    """Read an adapter's config and header. Raises CheckpointError for what is no adapter, with the
    problems of both files.

    key_mapping: pattern -> replacement on the module's path in each key, the first that fits, as
    in PEFT."""
    where = {k: v for k, v in kwargs.items() if v is not None}
    problems: list[str] = []
    kind = CheckpointError
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    path = fetch(str(model_id), SAFETENSORS_NAME, **where)
    try:
        if path is not None:
            shapes, metadata = _header(path)
        elif (path := fetch(str(model_id), BIN_NAME, **where)) is not None:
            held = _load_bin(path)
            shapes = {k: tuple(t.shape) for k, t in held.items()}
        else:
            problems.append(f"expected {SAFETENSORS_NAME} (or {BIN_NAME}), found neither")
    except CheckpointError as error:
        problems.append(str(error))
    try:
        if config is None:
            config = _config_of(model_id, path, metadata, where)
    except (CheckpointError, ConfigError) as error:
        problems.append(str(error))
        kind = AdapterConfigError if isinstance(error, ConfigError) else kind
    if problems or path is None:
        raise kind("\n  ".join([f"{model_id} is no adapter:", *problems]))
    found = AdapterFile(config, path, _once(shapes), metadata, held)
    if key_mapping:
        found.rename({k: _mapped(k, key_mapping) for k in found.shapes})
    return found


def _config_of(
    model_id: Any, path: Path | None, metadata: dict[str, str], where: dict[str, Any]
) -> Any:
    """The config of the folder, or the one that was staged when a save died after its commit."""
    staged = None if path is None else path.parent / f".{CONFIG_NAME}.{metadata.get(_CONFIG)}"
    if staged is not None and staged.is_file():
        return PeftConfig.from_file(staged)
    return PeftConfig.from_pretrained(model_id, **where)


def _mapped(key: str, key_mapping: Mapping[str, str]) -> str:
    prefix = next((p for p in (slots.PREFIX, "base_model.") if key.startswith(p)), "")
    path = key.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        new, count = re.subn(pattern, replacement, path)
        if count:
            return prefix + new
    return key


def check(
    root: nn.Module,
    adapter: AdapterFile,
    *,
    strict: bool = True,
    name: str | None = None,
    ignore_mismatched_sizes: bool = False,
) -> LoadReport:
    """Compare a file with the model it is for, without changing the model.

    name: compare with this adapter of the model; None: with the adapter that the config would
    make; ignore_mismatched_sizes: tensors of another shape are left out, with a warning. Raises
    CheckpointError (``strict``) or warns, with every problem at once."""
    problems = differences(adapter.metadata.get(_BASE, ""), root)
    if name is None:
        try:
            made = inject.plan(root, adapter.config, meta=True)
        except (ConfigError, TargetError) as error:
            raise CheckpointError(_message(adapter.path, [*problems, str(error)])) from error
        expected = slots.planned(root, made)
        paths = set(made.adapters)
    else:
        expected = slots.existing(root, adapter.config, name)
        paths = slots.adapted_paths(root)
    known = {**slots.embeddings(root, paths), **expected}
    missing = [k for k in expected if k not in adapter.shapes]
    unexpected = [k for k in adapter.shapes if k not in known]
    problems += [f"missing: {k}" for k in missing]
    problems += [
        f"unexpected: {k}{_near(k, expected) if i < _SHOWN else ''}"
        for i, k in enumerate(unexpected)
    ]
    shapes = {
        k: tuple(slot.filed(slot.tensor.detach()).shape)
        for k, slot in known.items()
        if k in adapter.shapes
    }
    misshapen = [
        f"shape of {k}: expected {shape}, got {adapter.shapes[k]}"
        for k, shape in shapes.items()
        if shape != adapter.shapes[k]
    ]
    # what fits is read, and nothing else: memory stays within the model's own sizes
    tensors = adapter.read([k for k, shape in shapes.items() if shape == adapter.shapes[k]])
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    problems += [f"not finite: {k}" for k in bad]
    _warn_without_effect(adapter)
    report = LoadReport(missing, unexpected, problems + misshapen)
    if (misshapen and not ignore_mismatched_sizes) or (strict and problems):
        raise CheckpointError(_message(adapter.path, report.problems))
    if misshapen:
        warnings.warn(
            f"Some weights of {_plain_class(root)} were not initialized from the model checkpoint "
            "and are being ignored because you passed `ignore_mismatched_sizes=True`: "
            + "; ".join(misshapen),
            FastAdaptWarning,
            stacklevel=3,
        )
    if missing and not strict:
        # PEFT's words, which scripts look for
        warnings.warn(
            f"Found missing adapter keys while loading the checkpoint: {missing}.",
            FastAdaptWarning,
            stacklevel=3,
        )
    if problems:
        warnings.warn(_message(adapter.path, report.problems), FastAdaptWarning, stacklevel=3)
    return report


def fill(root: nn.Module, adapter: AdapterFile, name: str) -> None:
    """Copy the tensors of a checked file into the adapter ``name`` of the model."""
    paths = slots.adapted_paths(root)
    layers = [root.get_submodule(path) for path in paths]
    constants.unshare(layers, name)
    places = {**slots.biases(root, paths), **slots.embeddings(root, paths)}
    places.update(slots.existing(root, adapter.config, name))
    forms: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for key, tensor in adapter.held.items():
            slot = places[key]
            part, suffix = slot.form
            if not part or slot.adapter is None:
                slot.tensor.copy_(tensor)
                continue
            held = forms.setdefault(slot.live, {})
            held[suffix] = tensor
            if len(held) == len(slot.adapter.file_forms(part)):
                slot.tensor.copy_(slot.adapter.from_file(part, held))
    adapter.held = {}
    constants.share(layers, name)


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
        _write(root, configs[name], tensors, where, safe_serialization)


def _write(
    root: nn.Module,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    folder: Path,
    safe_serialization: bool,
) -> None:
    if folder.is_file():
        raise OutputError(f"expected a directory to save to, got the file {folder}")
    ready = {k: t.to("cpu").contiguous().clone() for k, t in tensors.items()}
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": _plain_class(root), "parent_library": type(root).__module__}
    text = config.to_json(inference_mode=True, auto_mapping=mapping)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    metadata = {"format": "pt", _BASE: fingerprint(root), _CONFIG: digest}

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

    with locked(folder):
        staged = folder / f".{CONFIG_NAME}.{digest}"
        write_atomic(staged, text.encode())
        try:
            write_atomic(folder / (SAFETENSORS_NAME if safe_serialization else BIN_NAME), write)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        if not safe_serialization:
            # readers take the safetensors file first: an old one would hide the new values
            (folder / SAFETENSORS_NAME).unlink(missing_ok=True)
        staged.replace(folder / CONFIG_NAME)
        for left in folder.glob(f".{CONFIG_NAME}.*"):
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


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes (at most {MAX_HEADER_BYTES})")
        with safe_open(path, framework="pt") as file:
            shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
            return shapes, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, got {error}") from error


def _once(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Without the second and third copy of a bias that PEFT writes for bias="all" when the module
    is trained whole, and without a layer's copies of what the file holds for the whole model."""
    found = {
        k: v
        for k, v in shapes.items()
        if k.count(".") == 1 or f"base_model.{k.rpartition('.')[2]}" not in shapes
    }
    for key in shapes:
        for extra in (".modules_to_save.bias", ".original_module.bias"):
            if key.endswith(extra) and key.removesuffix(extra) + ".bias" in shapes:
                found.pop(key, None)
    return found


def _resized(root: nn.Module, config: AdapterConfig) -> str:
    """Words that say so when the vocabulary is not the one of the base's files; never asks the
    network."""
    size = getattr(getattr(root, "config", None), "vocab_size", None)
    where = config.base_model_name_or_path
    path = fetch(where, "config.json", local_files_only=True) if size and where else None
    if path is None or json.loads(path.read_bytes()).get("vocab_size", size) == size:
        return ""
    return "the embedding layer has been resized during finetuning"


def _load_bin(path: Path) -> dict[str, Tensor]:
    warnings.warn(
        f"{path} is a pickle; save the adapter again to get safetensors", FastAdaptWarning,
        stacklevel=4,
    )  # fmt: skip
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
                    raise ValueError("compressed entries, which torch does not write")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # what a broken pickle raises has no bound: KeyError, OSError, UnpicklingError, ...
        raise CheckpointError(f"{path}: expected a pickle of tensors only, got {error}") from error
    if not isinstance(values, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in values.items()
    ):
        raise CheckpointError(
            f"{path}: expected a dict of tensors by name, got a {type(values).__name__} of others"
        )
    return values


def _warn_without_effect(adapter: AdapterFile) -> None:
    b = [t for k, t in adapter.held.items() if ".lora_B." in k or k.endswith(".lora_embedding_B")]
    whole = [k for k in adapter.held if ".lora_" not in k]
    if b and not whole and all(not t.any() for t in b):
        warnings.warn(
            f"{adapter.path}: every lora_B is zero, this adapter changes nothing",
            FastAdaptWarning,
            stacklevel=4,
        )


def _near(key: str, expected: dict[str, Any]) -> str:
    if len(expected) > 20_000:
        return ""
    close = difflib.get_close_matches(key, expected, 1, 0.9)
    return f" (near {close[0]})" if close else ""


def _message(path: Path, problems: list[str]) -> str:
    shown = problems[:_SHOWN]
    more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n  ".join([f"{path} does not fit this model:", *shown, *more])


def _plain_class(root: nn.Module) -> str:
    return type(root).__name__
