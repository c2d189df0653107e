# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer reads adapter checkpoints only for a PeftModel; a model patched in place
needs two of its methods taught: resume, and load the best model at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastadapt.adapter_file import BIN_NAME, SAFETENSORS_NAME
from fastadapt.patch.inplace import PatchedModel

_originals: dict[str, Any] = {}


def install() -> None:
    """Wrap the two methods, once."""
    from transformers import Trainer

    if _originals:
        return
    trainer: Any = Trainer
    resume, best = trainer._load_from_checkpoint, trainer._load_best_model
    _originals.update(_load_from_checkpoint=resume, _load_best_model=best)

    def _load_from_checkpoint(self: Any, folder: str, model: Any = None) -> Any:
        ours = self.accelerator.unwrap_model(self.model if model is None else model)
        if isinstance(ours, PatchedModel) and _reads(self, ours, folder):
            return _load(ours, folder, trainable=True)
        return resume(self, folder, model)

    def _load_best_model(self: Any) -> Any:
        ours, folder = self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint
        if isinstance(ours, PatchedModel) and _reads(self, ours, folder):
            return _load(ours, folder, trainable=True)
        return best(self)

    trainer._load_from_checkpoint = _load_from_checkpoint
    trainer._load_best_model = _load_best_model


def uninstall() -> None:
    """Put Trainer's own methods back."""
    from transformers import Trainer

    for name, function in _originals.items():
        setattr(Trainer, name, function)
    _originals.clear()


def _reads(trainer: Any, model: PatchedModel, folder: str) -> bool:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    return all(
        (where / SAFETENSORS_NAME).is_file() or (where / BIN_NAME).is_file()
        for where in _folders(model, folder).values()
    )


def _load(model: PatchedModel, folder: str, trainable: bool) -> None:
    for name, where in _folders(model, folder).items():
        model.load_adapter(os.fspath(where), name, is_trainable=trainable)


def _folders(model: PatchedModel, folder: str) -> dict[str, Path]:
    return {n: Path(folder) if n == "default" else Path(folder) / n for n in model.peft_config}
