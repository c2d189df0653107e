# SPDX-License-Identifier: Apache-2.0
"""Files of tensors from anyone: a safetensors header, or a pickle of tensors and nothing else."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from fastadapt.errors import CheckpointError, FastAdaptWarning

MAX_HEADER_BYTES = 16 << 20
"""An adapter of 18,000 layers has 6 MB; the format itself allows 100 MB, whose parsing takes
several times that."""


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(name -> shape, metadata) of a safetensors file; CheckpointError for what is none."""
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


def read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, with a warning; CheckpointError for one that holds more."""
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
