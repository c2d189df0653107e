# SPDX-License-Identifier: Apache-2.0
"""An adapter on disk: its config and the shapes of its tensors, read without looking at a model.

A folder's two files are one adapter: the rename of the tensors' file commits a save. The config is
staged beside it first, under a digest that belongs to that file (``staged_name``); a reader that
finds the staged file knows that the save died after its commit, and takes it.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastadapt import dialects, slots, targets
from fastadapt.config import CONFIG_NAME, AdapterConfig, PeftConfig
from fastadapt.errors import (
    AdapterConfigError,
    CheckpointError,
    ConfigError,
    FastAdaptWarning,
    UnsupportedError,
)
from fastadapt.files import fetch
from fastadapt.methods import method_of
from fastadapt.tensor_files import read_bin, read_header

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
BASE_KEY = "fastadapt_base"
CONFIG_KEY = "fastadapt_config"
"""Metadata of the tensors' file: the base's fingerprint, the digest of the config."""


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
    reshaped: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Keys without PEFT's prefix, and those that an earlier release gave other names."""
        ours = any(k.startswith("base_model.") for k in self.shapes)
        if not ours and not dialects.foreign(self.shapes):
            self.rename({k: _prefixed(k) for k in self.shapes})
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
        for key in self.reshaped & self.held.keys():
            self.held[key] = self.held[key].reshape(self.shapes[key])
        return self.held

    def translate(self, spoken: dialects.Translation) -> None:
        """Take PEFT's keys for a dialect's; what has none (alphas, other models) is dropped."""
        kept = {*spoken.names, *spoken.unknown}
        self.shapes = {k: v for k, v in self.shapes.items() if k in kept} | spoken.shapes
        self.rename({**{k: _prefixed(k) for k in spoken.unknown}, **spoken.names})
        self.reshaped = {spoken.names[k] for k in spoken.shapes}


def open_adapter(
    model_id: Any,
    *,
    root: nn.Module | None = None,
    config: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    weight_name: str | None = None,
    **kwargs: Any,
) -> AdapterFile:
    """Read an adapter's config and header. Raises CheckpointError for what is no adapter, with the
    problems of both files.

    model_id: a folder, a hub repository, or a file; root: the model that it is for, which files of
    other tools (``dialects``) need; key_mapping: pattern -> replacement on the module's path in
    each key, the first that fits, as in PEFT; weight_name: the tensors' file in the folder."""
    where = {k: v for k, v in kwargs.items() if v is not None}
    problems: list[str] = []
    kind = CheckpointError
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    spoken: dialects.Translation | None = None
    path: Path | None = None
    try:
        path = _tensors_file(str(model_id), weight_name, where)
        if path.suffix == ".safetensors":
            shapes, metadata = read_header(path)
        else:
            held = read_bin(path)
            shapes = {k: tuple(t.shape) for k, t in held.items()}
        if dialects.foreign(shapes):
            spoken = _spoken(path, shapes, held, root)
    except (CheckpointError, UnsupportedError) as error:
        problems.append(str(error))
    try:
        if config is None:
            fields = None if spoken is None else _fields(spoken, metadata)
            config = _config_of(model_id, path, metadata, where, fields)
    except (CheckpointError, ConfigError) as error:
        problems.append(str(error))
        kind = AdapterConfigError if isinstance(error, ConfigError) else kind
    if problems or path is None:
        raise kind("\n  ".join([f"{model_id} is no adapter:", *problems]))
    if spoken is None:
        shapes = _once(shapes)
    found = AdapterFile(config, path, shapes, metadata, held)
    if spoken is not None:
        found.translate(spoken)
    if key_mapping:
        found.rename({k: _mapped(k, key_mapping) for k in found.shapes})
    return found


def _tensors_file(model_id: str, weight_name: str | None, where: dict[str, Any]) -> Path:
    if Path(model_id).is_file():
        return Path(model_id)
    names = [weight_name] if weight_name else [SAFETENSORS_NAME, BIN_NAME, DIFFUSERS_NAME]
    for name in names:
        path = fetch(model_id, name, **where)
        if path is not None:
            return path
    others = f" (or {' or '.join(names[1:])})" if names[1:] else ""
    hub = "" if Path(model_id).exists() else " in a folder, on the hub or in its cache"
    raise CheckpointError(f"expected {names[0]}{others}, found none{hub}")


def _spoken(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    held: dict[str, Tensor],
    root: nn.Module | None,
) -> dialects.Translation:
    """What the keys of another tool's file mean for the model."""
    if root is None:
        raise CheckpointError(
            f"{path}: expected PEFT's keys, got another tool's ({next(iter(shapes))}): they are "
            "read into a model, by PeftModel.from_pretrained or load_adapter"
        )

    numbers = [k for k, shape in shapes.items() if k.endswith(".alpha") and shape in ((), (1,))]
    alphas = {k: float(held[k]) for k in numbers if k in held}
    if numbers and not held:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            alphas = {k: float(file.get_tensor(k)) for k in numbers}

    def alpha_of(key: str) -> float:
        if key not in alphas:
            raise CheckpointError(f"{key}: expected one number, got shape {shapes[key]}")
        return alphas[key]

    about = getattr(root, "config", None)
    levels = (
        about.get("layers_per_block")
        if isinstance(about, dict)
        else getattr(about, "layers_per_block", 2)
    )
    modules = [p for p, _ in targets.walk(root)]
    found = dialects.translate(shapes, modules, alpha_of, levels if isinstance(levels, int) else 2)
    if found.other:
        warnings.warn(
            f"{path}: left out what is for other models: {', '.join(sorted(found.other))}",
            FastAdaptWarning,
            stacklevel=4,
        )
    return found


def _fields(spoken: dialects.Translation, metadata: dict[str, str]) -> dict[str, Any]:
    """Of the config: those that the tensors say, over those that diffusers wrote beside them."""
    try:
        written = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        own = {k.rpartition(".")[2]: v for k, v in written.items()
               if k.rpartition(".")[0] in spoken.components}  # fmt: skip
    except (ValueError, AttributeError, RecursionError):
        own = {}
    said = {k: own[k] for k in ("lora_alpha", "alpha_pattern", "use_rslora") if k in own}
    return {**spoken.fields, **said}


def staged_name(digest: str) -> str:
    """The file that holds the config until it is moved to its own name."""
    return f".{CONFIG_NAME}.{digest}"


def file_digest(path: Path) -> str:
    """Of a file without room for metadata."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _config_of(
    model_id: Any,
    path: Path | None,
    metadata: dict[str, str],
    where: dict[str, Any],
    fields: dict[str, Any] | None,
) -> Any:
    """The config of the folder, or the one that was staged when a save died after its commit;
    ``fields`` of another tool's file, where there is no config."""
    if path is not None and any(path.parent.glob(staged_name("*"))):
        digest = file_digest(path) if path.name == BIN_NAME else metadata.get(CONFIG_KEY)
        staged = path.parent / staged_name(str(digest))
        if staged.is_file():
            return PeftConfig.from_file(staged)
    if fields is not None and fetch(str(model_id), CONFIG_NAME, **where) is None:
        return PeftConfig.from_peft_type(**fields)
    return PeftConfig.from_pretrained(model_id, **where)


def _prefixed(key: str) -> str:
    """A key of a file that was written without ``base_model.model.``; tensors of the whole adapter
    (VeRA's) have no path."""
    key = re.sub(r"^(module\.|_orig_mod\.)+", "", key)
    return (slots.PREFIX if "." in key else "base_model.") + key


def _mapped(key: str, key_mapping: Mapping[str, str]) -> str:
    prefix = next((p for p in (slots.PREFIX, "base_model.") if key.startswith(p)), "")
    path = key.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        new, count = re.subn(pattern, replacement, path)
        if count:
            return prefix + new
    return key


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
