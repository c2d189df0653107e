# SPDX-License-Identifier: Apache-2.0
"""Output folders: checked before the work begins, replaced whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastadapt.errors import OutputError

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
CHECKPOINT = "checkpoint-"
"""How transformers' Trainer names the folders of its checkpoints: checkpoint-<step>."""


def claim(folder: str | Path, *, keep: bool, overwrite: bool) -> Path:
    """Make sure that ``folder`` can be written before an hour of training goes by.

    An adapter or checkpoints of an earlier run raise OutputError, unless ``keep`` (a resumed run)
    or ``overwrite`` says what to do with them. Nothing is removed here.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    if not keep and not overwrite:
        found = [n for n in ADAPTER_FILES if (folder / n).exists()]
        found += [path.name for path in checkpoints(folder)]
        if found:
            raise OutputError(
                f"{folder} holds {found[0]} of an earlier run: choose another folder, "
                "continue it with --resume, or replace it with --overwrite"
            )
    return folder


def claim_new(folder: str | Path, *, overwrite: bool) -> Path:
    """A folder that is to be written whole (``replacing``): it must be empty or not there yet,
    unless ``overwrite``. Raises OutputError."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(
            f"{folder} is not empty: choose another folder, or replace it with --overwrite"
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, expected a folder or nothing")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write beside {folder}: {error.strerror or error}") from error
    return folder


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first. The Trainer writes its state last."""
    found = [
        path
        for path in Path(folder).glob(f"{CHECKPOINT}*")
        if path.name.removeprefix(CHECKPOINT).isdigit() and (path / "trainer_state.json").is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def remove_checkpoints(folder: str | Path) -> None:
    """Remove every checkpoint in ``folder``, complete or not."""
    for path in Path(folder).glob(f"{CHECKPOINT}*"):
        if path.name.removeprefix(CHECKPOINT).isdigit():
            shutil.rmtree(path)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A fresh folder that takes the place of ``folder`` when the block ends without an error."""
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"cannot write beside {folder}: {error.strerror or error}") from error
    try:
        yield fresh
        fresh.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
