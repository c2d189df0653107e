# SPDX-License-Identifier: Apache-2.0
"""Trained rows of an embedding, alone and next to LoRA, against PEFT's outputs and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastadapt
from fastadapt.errors import ConfigError, TargetError, UnsupportedError
from tests import tiny
from tests.parity import models

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = [5, 1, 90]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tokens": ("llama", "TrainableTokensConfig", {"token_indices": TOKENS}),
    "tokens-tied": ("tied", "TrainableTokensConfig", {"token_indices": TOKENS}),
    "lora": (
        "llama", "LoraConfig", {"trainable_token_indices": TOKENS, "target_modules": ["q_proj"]},
    ),
    "lora-tied": (
        "tied", "LoraConfig", {"trainable_token_indices": TOKENS, "target_modules": ["q_proj"]},
    ),
    "lora-names": (
        "gpt2", "LoraConfig",
        {"trainable_token_indices": {"wte": TOKENS, "wpe": [2]}, "target_modules": ["c_attn"]},
    ),
}  # fmt: skip


def adapted(library: Any, name: str) -> Any:
    kind, config, fields = CASES[name]
    torch.manual_seed(0)
    made = getattr(library, config)(**fields, task_type="CAUSAL_LM")
    return library.get_peft_model(models.make(kind), made)


def moved(model: Any) -> Any:
    with torch.no_grad():
        for i, p in enumerate(q for q in model.parameters() if q.requires_grad):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p += 0.3 * noise
    return model


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return models.run(model.eval(), CASES[name][0])


@pytest.mark.parametrize("name", CASES)
def test_the_same_start_files_and_outputs(name: str, tmp_path: Path) -> None:
    theirs, ours = adapted(peft, name), adapted(fastadapt, name)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    start = logits(models.make(CASES[name][0]), name)
    close(logits(ours, name), start)
    moved(theirs).save_pretrained(tmp_path / "theirs")
    moved(ours).save_pretrained(tmp_path / "ours")
    loaded = fastadapt.PeftModel.from_pretrained(models.make(CASES[name][0]), tmp_path / "theirs")
    close(logits(loaded, name), logits(theirs, name))
    back = peft.PeftModel.from_pretrained(models.make(CASES[name][0]), str(tmp_path / "ours"))
    close(logits(back, name), logits(ours, name))
    assert (logits(ours, name) - start).abs().max() > 1e-2
    before = logits(ours, name)
    close(logits(ours.merge_and_unload(), name), before)


@pytest.mark.parametrize("name", ["tokens-tied", "lora-tied"])
def test_a_tied_head_learns_the_same_rows(name: str) -> None:
    model = adapted(fastadapt, name)
    rows = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert len(rows) == 1
    model(**tiny.batch("tied")).loss.backward()
    # no token of the batch needs to be one of them: the head alone reaches every row
    assert rows[0].grad.abs().sum(1).min() > 0


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"trainable_token_indices": [1, 1]}, ConfigError, "twice"),
        ({"trainable_token_indices": [96]}, ConfigError, "0 to 95"),
        ({"trainable_token_indices": [-1]}, ConfigError, "integers"),
        ({"trainable_token_indices": {"nowhere": [1]}}, TargetError, "nowhere"),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
            UnsupportedError, "choose one",
        ),
    ],
)  # fmt: skip
def test_bad_tokens_leave_the_model_alone(
    fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    model = tiny.model()
    before = tiny.snapshot(model)
    with pytest.raises(error, match=says):
        fastadapt.get_peft_model(
            model, fastadapt.LoraConfig(**{"target_modules": ["q_proj"], **fields})
        )
    tiny.assert_same(model, before)
