# SPDX-License-Identifier: Apache-2.0
"""Files that are no adapters: refused before the model is touched, at the cost of their size."""

from __future__ import annotations

import json
import os
import pickle
import resource
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastadapt
from fastadapt.errors import (
    CheckpointError,
    ConfigError,
)
from tests import tiny
from tests.adapter_files import (
    BIN,
    CONFIG,
    TENSORS,
    Q,
    refused,
)
from tests.tiny import one_thread  # noqa: F401


@pytest.mark.parametrize("keep", [0, 4, 8, 9, 200, -1])
def test_truncated_files(keep: int, saved: Path) -> None:
    data = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(data[:keep])
    refused(saved, CheckpointError, TENSORS)


@pytest.mark.parametrize(
    "data",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        (1 << 40).to_bytes(8, "little") + b"{" * 100,
        (101_000_000).to_bytes(8, "little") + b" " * 1000,
        (2).to_bytes(8, "little") + b"[]",
        (16).to_bytes(8, "little") + b"{" * 16,
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x04." * 10,
    ],
    ids=["2^62", "2^40", "101MB", "list", "nested", "zip", "pickle"],
)
def test_headers_that_lie(data: bytes, saved: Path) -> None:
    (saved / TENSORS).write_bytes(data)
    refused(saved, CheckpointError, TENSORS)


def test_offsets_that_lie(saved: Path) -> None:
    header = {Q: {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1 << 50]}}
    text = json.dumps(header).encode()
    (saved / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)
    refused(saved, CheckpointError, TENSORS)


def test_no_tensors_at_all(saved: Path) -> None:
    (saved / TENSORS).unlink()
    refused(saved, CheckpointError, TENSORS, BIN)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", CheckpointError, CONFIG)


def test_a_small_file_cannot_ask_for_gigabytes(saved: Path) -> None:
    """PEFT allocates 3 GB for r = 3000000 before it looks at the file; this is refused unread,
    and so is a rank that is allowed and not the file's."""
    values = json.loads((saved / CONFIG).read_text())
    for r, error in ((3_000_000, ConfigError), (60_000, CheckpointError)):
        (saved / CONFIG).write_text(json.dumps({**values, "r": r}))
        model = tiny.model()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(error):
            fastadapt.PeftModel.from_pretrained(model, saved)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        # 60000 x 64 floats in four A alone would be 60 MB; units are KiB
        assert grown < 8 << 10


class Payload:
    def __init__(self, flag: Path) -> None:
        self.flag = str(flag)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.flag,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_cannot_run_code(write: Any, saved: Path, tmp_path: Path) -> None:
    (saved / TENSORS).unlink()
    with (saved / BIN).open("wb") as file:
        write({Q: Payload(tmp_path / "ran")}, file)
    refused(saved, CheckpointError, BIN)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"a": 1}, [torch.ones(1)], torch.ones(1), {1: torch.ones(1)}])
def test_pickles_of_something_else(content: Any, saved: Path) -> None:
    (saved / TENSORS).unlink()
    torch.save(content, saved / BIN)
    refused(saved, CheckpointError)


def test_truncated_pickles(saved: Path) -> None:
    torch.save(load_file(saved / TENSORS), saved / BIN)
    (saved / TENSORS).unlink()
    data = (saved / BIN).read_bytes()
    for keep in (0, 10, len(data) // 2):
        (saved / BIN).write_bytes(data[:keep])
        refused(saved, CheckpointError, BIN)


def test_problems_of_both_files_are_in_one_error(saved: Path) -> None:
    values = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**values, "r": 3_000_000}))
    (saved / TENSORS).write_bytes((saved / TENSORS).read_bytes()[:9])
    refused(saved, CheckpointError, "3000000", "expected a safetensors file")


def test_a_header_too_long_is_refused_unread(saved: Path) -> None:
    size = 64 << 20
    with (saved / TENSORS).open("wb") as file:
        file.write(size.to_bytes(8, "little") + b'{"__metadata__":{}}')
        file.truncate(size + 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(saved, CheckpointError, "header of 67108864 bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_a_pickle_cannot_unpack_to_gigabytes(saved: Path) -> None:
    torch.save({Q: torch.zeros(1 << 22)}, saved / "plain")
    with (
        zipfile.ZipFile(saved / "plain") as old,
        zipfile.ZipFile(saved / BIN, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    (saved / TENSORS).unlink()
    refused(saved, CheckpointError, "compressed")


def test_thousands_of_patterns_have_two_seconds(saved: Path) -> None:
    """Each is quick; for every layer once more they are not."""
    values = json.loads((saved / CONFIG).read_text())
    hostile = {f"(x+x+)+y{i}|q_proj{i}z": 3 for i in range(100_000)}
    plain = {f"layers.{i}.mlp": 3 for i in range(20_000)}
    model = tiny.model()
    before = tiny.snapshot(model)
    start = time.process_time()
    (saved / CONFIG).write_text(json.dumps({**values, "rank_pattern": hostile}))
    with pytest.raises(CheckpointError, match="takes too long"):
        fastadapt.PeftModel.from_pretrained(model, saved)
    tiny.assert_same(model, before)
    (saved / CONFIG).write_text(json.dumps({**values, "rank_pattern": plain}))
    fastadapt.PeftModel.from_pretrained(model, saved)
    # no hang: far above the limit and the time to read megabytes of config
    assert time.process_time() - start < 30
