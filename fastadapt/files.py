# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and files that may live on the hub."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastadapt.errors import CheckpointError, OutputError

LOCK_SECONDS = 30.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer of a folder at a time, across processes; made if it is not there. A file system
    without locks has none. Raises OutputError when another writer stays for ``LOCK_SECONDS``."""
    handle: int | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{folder} could not be written: {error}") from error
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"{folder} could not be written: another process is saving to it"
                    ) from error
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        os.close(handle)


def write_atomic(
    path: Path,
    content: bytes | Callable[[Path], None],
    before: Callable[[Path], None] | None = None,
) -> None:
    """Write to a temporary file beside ``path``, sync, rename. ``content`` may be a writer;
    ``before`` is called with the temporary file when all is ready for the rename.

    Raises OutputError when the folder cannot be made or written; the old file then stands."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        os.close(handle)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        if before is not None:
            before(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def fetch(
    repository: str, name: str, *, subfolder: str | None = None, **kwargs: Any
) -> Path | None:
    """A file of a local folder, else of a hub repository; None when there is no such file, there
    or, offline, in the cache. Raises CheckpointError for a revision that is not there and for an
    answer of the hub that is no file."""
    folder = Path(repository) / subfolder if subfolder else Path(repository)
    if (folder / name).is_file():
        return folder / name
    if Path(repository).exists() or os.path.isabs(repository):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    accepted = {"revision", "cache_dir", "token", "local_files_only", "force_download", "repo_type"}
    options = {k: v for k, v in kwargs.items() if k in accepted}
    try:
        return Path(hf_hub_download(repository, name, subfolder=subfolder, **options))
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{name} of {repository}: {error}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
