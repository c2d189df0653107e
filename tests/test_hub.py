# SPDX-License-Identifier: Apache-2.0
"""Adapters of hub repositories: revisions, subfolders and errors; the hub is a folder here."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace as Answer
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import fastadapt
from fastadapt.errors import CheckpointError
from tests import tiny
from tests.adapter_files import adapted, logits
from tests.tiny import one_thread  # noqa: F401


class Hub:
    """``hf_hub_download`` over <root>/<repository>/<revision>; ``calls`` is what was asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[dict[str, Any]] = []
        self.offline = False

    def __call__(
        self, repo_id: str, filename: str, *, subfolder: str | None = None,
        revision: str | None = None, **options: Any,
    ) -> str:  # fmt: skip
        self.calls.append({"filename": filename, "subfolder": subfolder, "revision": revision,
                           **options})  # fmt: skip
        answer: Any = Answer(headers={}, status_code=404, request=None)
        if self.offline:
            raise LocalEntryNotFoundError("offline, and not in the cache")
        if not (self.root / repo_id).is_dir():
            raise RepositoryNotFoundError("no such repository", response=answer)
        at = self.root / repo_id / (revision or "main")
        if not at.is_dir():
            raise RevisionNotFoundError(f"no revision {revision}", response=answer)
        file = at / (subfolder or "") / filename
        if not file.is_file():
            raise EntryNotFoundError("no such file")
        return str(file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """me/adapter: alpha 1 at "main", 2 at "v2", and 3 in the subfolder "inner" of "v2"."""
    root = tmp_path / "hub"
    for alpha, where in ((1, "main"), (2, "v2"), (3, "v2/inner")):
        adapted(lora_alpha=alpha).save_pretrained(root / "me" / "adapter" / where)
    made = Hub(root)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made)
    return made


WAYS: list[tuple[dict[str, Any], int]] = [
    ({}, 1), ({"revision": "v2"}, 2), ({"revision": "v2", "subfolder": "inner"}, 3),
]  # fmt: skip


@pytest.mark.parametrize(("where", "alpha"), WAYS, ids=["main", "revision", "subfolder"])
def test_revisions_and_subfolders(where: dict[str, Any], alpha: int, hub: Hub) -> None:
    model = fastadapt.PeftModel.from_pretrained(tiny.model(), "me/adapter", token="t", **where)
    assert model.peft_config["default"].lora_alpha == alpha
    assert torch.equal(logits(model), logits(adapted(lora_alpha=alpha)))
    assert all(c["revision"] == where.get("revision") and c["token"] == "t" for c in hub.calls)
    model.load_adapter("me/adapter", "other", **where)
    assert model.peft_config["other"].lora_alpha == alpha
    assert fastadapt.PeftConfig.from_pretrained("me/adapter", **where).lora_alpha == alpha


@pytest.mark.parametrize(("where", "alpha"), WAYS, ids=["main", "revision", "subfolder"])
def test_the_automatic_class_too(
    where: dict[str, Any], alpha: int, hub: Hub, tmp_path: Path
) -> None:
    tiny.model().save_pretrained(tmp_path / "base")
    for folder in hub.root.rglob("adapter_config.json"):
        text = folder.read_text().replace('"task_type": null', '"task_type": "CAUSAL_LM"')
        text = text.replace('"base_model_name_or_path": null',
                            f'"base_model_name_or_path": "{tmp_path / "base"}"')  # fmt: skip
        folder.write_text(text)
    model = fastadapt.AutoPeftModelForCausalLM.from_pretrained("me/adapter", **where)
    assert model.peft_config["default"].lora_alpha == alpha


def test_what_is_not_there_is_one_error(hub: Hub) -> None:
    model = tiny.model()
    before = tiny.snapshot(model)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("me/nothing", {}, "adapter_model.safetensors"),
        ("me/adapter", {"revision": "v9"}, "no revision v9"),
        ("me/adapter", {"subfolder": "outer"}, "adapter_config.json"),
        ("not a / name", {}, "adapter_config.json"),
    ]
    for name, where, says in cases:
        with pytest.raises(CheckpointError, match=says):
            fastadapt.PeftModel.from_pretrained(model, name, **where)
    hub.offline = True
    with pytest.raises(CheckpointError, match="cache"):
        fastadapt.PeftModel.from_pretrained(model, "me/adapter")
    tiny.assert_same(model, before)


def test_a_hub_that_fails(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    answer: Any = Answer(headers={}, status_code=503, request=None)

    def fail(*_: Any, **__: Any) -> str:
        raise HfHubHTTPError("503 of the hub", response=answer)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match="503"):
        fastadapt.PeftModel.from_pretrained(tiny.model(), "me/adapter")


def test_only_a_pickle_on_the_hub(hub: Hub) -> None:
    folder = hub.root / "me" / "old" / "main"
    adapted(lora_alpha=5).save_pretrained(folder, safe_serialization=False)
    with pytest.warns(UserWarning, match="is a pickle"):
        model = fastadapt.PeftModel.from_pretrained(tiny.model(), "me/old")
    assert model.peft_config["default"].lora_alpha == 5
    shutil.rmtree(folder)
