# SPDX-License-Identifier: Apache-2.0
"""What is in an adapter's folder, from its two files alone; the base model is never loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastadapt.errors import CheckpointError
from fastadapt.files import fetch

if TYPE_CHECKING:
    from rich.table import Table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHOWN = (
    "peft_type", "base_model_name_or_path", "task_type", "r", "lora_alpha", "lora_dropout",
    "target_modules", "modules_to_save", "use_dora", "use_rslora", "bias", "peft_version",
)  # fmt: skip


def inspect_adapter(adapter: str) -> dict[str, Any]:
    """Config, base, size, and each tensor's name, shape, dtype, norm and whether it is finite.

    ``adapter`` is a folder or a repository of the hub. Norms are Frobenius norms in float64.
    Raises CheckpointError for files that are missing or are not what they should be.
    """
    config = _config(_found(adapter, CONFIG))
    weights = _found(adapter, WEIGHTS)
    tensors = _tensors(weights)
    return {
        "adapter": adapter,
        "base_model": config.get("base_model_name_or_path"),
        "config": config,
        "bytes": weights.stat().st_size,
        "parameters": sum(_count(tensor["shape"]) for tensor in tensors),
        "finite": all(tensor["finite"] for tensor in tensors),
        "tensors": tensors,
    }


def summary(document: dict[str, Any]) -> str:
    """The config fields that say most and the totals, one a line."""
    config = document["config"]
    lines = [f"{name}: {config[name]}" for name in SHOWN if config.get(name) not in (None, "")]
    lines.append(
        f"{len(document['tensors'])} tensors, {document['parameters']:,} parameters, "
        f"{document['bytes'] / 2**20:.1f} MiB"
    )
    if not document["finite"]:
        bad = [t["name"] for t in document["tensors"] if not t["finite"]]
        lines.append(f"NOT FINITE: {', '.join(bad)}")
    return "\n".join(lines)


def table(document: dict[str, Any]) -> Table:
    """One row a tensor."""
    from rich.table import Table

    made = Table("tensor", "shape", "dtype", "norm")
    for tensor in document["tensors"]:
        norm = f"{tensor['norm']:.4g}" if tensor["finite"] else "not finite"
        made.add_row(tensor["name"], str(tuple(tensor["shape"])), tensor["dtype"], norm)
    return made


def _found(adapter: str, name: str) -> Path:
    path = fetch(adapter, name)
    if path is None:
        where = "is there" if Path(adapter).is_dir() else "no such folder or hub repository"
        raise CheckpointError(f"expected {name} in {adapter!r}, not found ({where})")
    return path


def _config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or "peft_type" not in content:
        raise CheckpointError(f"{path} is not an adapter's config: it has no 'peft_type'")
    return content


def _tensors(path: Path) -> list[dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    found = []
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in sorted(file.keys()):
                tensor: torch.Tensor = file.get_tensor(name)
                finite = bool(torch.isfinite(tensor).all())
                found.append(
                    {
                        "name": name,
                        "shape": list(tensor.shape),
                        "dtype": str(tensor.dtype).removeprefix("torch."),
                        "norm": float(tensor.double().norm()) if finite else None,
                        "finite": finite,
                    }
                )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    return found


def _count(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
