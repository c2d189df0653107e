# SPDX-License-Identifier: Apache-2.0
"""Adapter files are written whole or not at all, whoever kills, fills or fights."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastadapt
from fastadapt import checkpoint
from fastadapt.adapter_file import open_adapter
from fastadapt.errors import (
    CheckpointError,
    LifecycleError,
    OutputError,
)
from fastadapt.files import locked
from tests import tiny
from tests.adapter_files import (
    BIN,
    CONFIG,
    TENSORS,
    adapted,
    fresh,
    logits,
)
from tests.tiny import one_thread  # noqa: F401


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("door", [fastadapt.patch, fastadapt.get_peft_model])
def test_values_that_are_not_finite_are_not_saved(door: Any, tmp_path: Path) -> None:
    model = adapted(door)
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    with torch.no_grad():
        next(p for n, p in tiny.adapter_parameters(model))[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite.*q_proj\.lora_A"):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == before


def test_parameters_that_are_elsewhere_are_not_saved(tmp_path: Path) -> None:
    """ZeRO-3 leaves empty tensors behind; a file of those would be an adapter of nothing."""
    model = adapted()
    for _, parameter in tiny.adapter_parameters(model):
        parameter.data = torch.empty(0)
    with pytest.raises(CheckpointError, match="gathered"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_adapters_are_checked_before_one_is_written(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", fastadapt.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in tiny.adapter_parameters(model):
            if ".other." in name:
                parameter.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="'other'"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(LifecycleError, match="nobody"):
        adapted().save_pretrained(tmp_path, selected_adapters=["nobody"])
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for where in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none"),
                  Path("/dev/null")):  # fmt: skip
        with pytest.raises(OutputError, match=r"could not be written|expected a directory"):
            adapted().save_pretrained(where)
    assert (tmp_path / "file").read_text() == "mine"


def child(work: Callable[[], Any]) -> int:
    """A copy of this process that does ``work`` and leaves (0: it raised nothing)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_save_that_died_after_its_commit_is_read_as_the_new_one(
    safe: bool, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors' file is renamed first: the config that goes with it is beside it then."""
    model = adapted(lora_alpha=32)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies_at(CONFIG, Path.replace))
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(saved, safe_serialization=safe)
    assert json.loads((saved / CONFIG).read_text())["lora_alpha"] != 32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = fastadapt.PeftModel.from_pretrained(tiny.model(), saved)
    assert loaded.peft_config["default"].lora_alpha == 32
    assert torch.equal(logits(loaded), logits(model))
    model.save_pretrained(saved, safe_serialization=safe)
    assert {p.name for p in saved.iterdir()} == {TENSORS if safe else BIN, CONFIG}


def dies_at(name: str, replace: Callable[..., Any]) -> Callable[..., Any]:
    """``Path.replace``, but for a file of this name the process ends."""

    def dying(self: Path, target: Path) -> Any:
        if Path(target).name == name:
            raise KeyboardInterrupt
        return replace(self, target)

    return dying


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_save_that_died_before_its_commit_is_as_if_it_never_was(
    safe: bool, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config is staged already, and belongs to tensors that are not there."""
    adapted(lora_alpha=4).save_pretrained(saved, safe_serialization=safe)
    other = fresh(lora_alpha=32)
    name = TENSORS if safe else BIN
    old = (saved / name).read_bytes(), (saved / CONFIG).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies_at(name, Path.replace))
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(saved, safe_serialization=safe)
    assert len(list(saved.iterdir())) == 4
    assert ((saved / name).read_bytes(), (saved / CONFIG).read_bytes()) == old
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = fastadapt.PeftModel.from_pretrained(tiny.model(), saved)
    assert loaded.peft_config["default"].lora_alpha == 4


def test_a_folder_that_may_not_be_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only mount, where the folder can be opened and locked."""
    before = files(saved)

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(OutputError, match=r"could not be written.*Read-only"):
        adapted().save_pretrained(saved)
    assert files(saved) == before


def test_a_config_that_was_edited_after_the_save_counts(saved: Path) -> None:
    values = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**values, "lora_alpha": 3}))
    loaded = fastadapt.PeftModel.from_pretrained(tiny.model(), saved)
    assert loaded.peft_config["default"].lora_alpha == 3


def test_an_old_safetensors_file_does_not_hide_a_new_bin(saved: Path) -> None:
    adapted().save_pretrained(saved, safe_serialization=False)
    assert {p.name for p in saved.iterdir()} == {BIN, CONFIG}


def test_two_writers_take_turns_and_one_that_stays_is_an_error(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(saved)
    monkeypatch.setattr("fastadapt.files.LOCK_SECONDS", 0.1)
    with locked(saved), pytest.raises(OutputError, match="another process is saving"):
        adapted().save_pretrained(saved)
    assert files(saved) == before
    adapted().save_pretrained(saved)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_full_disk_leaves_the_old_files(safe: bool, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the write fails half way."""
    model = adapted(target_modules="all-linear")
    model.save_pretrained(tmp_path, safe_serialization=safe)
    before = files(tmp_path)

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OutputError, match="could not be written"):
            model.save_pretrained(tmp_path, safe_serialization=safe)

    assert os.waitpid(child(save), 0)[1] == 0
    assert files(tmp_path) == before


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "kills", [pytest.param(8), pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_killed_while_saving(kills: int, safe: bool, saved: Path) -> None:
    """Whenever the process dies, what loads is one save: its values go with its config."""
    model = adapted()
    config = model.peft_config["default"]

    def save_as(i: int) -> None:
        config.lora_alpha = i
        with torch.no_grad():
            for _, parameter in tiny.adapter_parameters(model):
                parameter.fill_(i)
        model.save_pretrained(saved, safe_serialization=safe)

    save_as(1)
    seen = set()
    for i in range(kills):
        told, tell = os.pipe()

        def save_on_and_on(start: int = 2 + 1000 * i, tell: int = tell) -> None:
            for value in range(start, start + 10**6):
                os.write(tell, b".")
                save_as(value)

        pid = child(save_on_and_on)
        os.read(told, 1)
        # a save takes some milliseconds: these delays fall all over the first few
        time.sleep(0.0011 * (7 * i % 40))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told), os.close(tell)
        file = open_adapter(saved)
        checkpoint.check(tiny.model(), file)
        values = {v.unique().item() for v in file.held.values()}
        assert values == {float(file.config.lora_alpha)}  # type: ignore[attr-defined]
        seen |= values
    assert len(seen) > 1
