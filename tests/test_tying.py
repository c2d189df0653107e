# SPDX-License-Identifier: Apache-2.0
"""``ensure_weight_tying``: one adapter for the embedding and what is tied to it, against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadapt
from fastadapt.errors import ConfigError, FastAdaptWarning, UnsupportedError
from tests.parity import models

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

CASES: dict[str, dict[str, Any]] = {
    "targets": {"target_modules": ["q_proj", "lm_head"]},
    "pattern": {"target_modules": r".*(q_proj|embed_tokens)"},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [5, 1]},
    },
}


def adapted(library: Any, name: str, **more: Any) -> Any:
    fields = {"r": 4, "ensure_weight_tying": True, "task_type": "CAUSAL_LM", **CASES[name], **more}
    base = models.make("tied")
    torch.manual_seed(0)
    return library.get_peft_model(base, library.LoraConfig(**fields))


def moved(model: Any) -> Any:
    """Every trained parameter but the head's, which shares its memory or is no parameter."""
    with torch.no_grad():
        for i, (key, p) in enumerate(model.named_parameters()):
            if p.requires_grad and "lm_head" not in key:
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return models.run(model.eval(), "tied")


@pytest.mark.parametrize("name", CASES)
def test_files_are_pefts_and_merging_keeps_the_outputs(name: str, tmp_path: Path) -> None:
    theirs, ours = moved(adapted(peft, name)), moved(adapted(fastadapt, name))
    want, got = logits(theirs), logits(ours)
    for key, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / key)
    there = fastadapt.PeftModel.from_pretrained(models.make("tied"), tmp_path / "theirs")
    here = peft.PeftModel.from_pretrained(models.make("tied"), tmp_path / "ours")
    assert error(logits(there), want) < 2e-5
    assert error(logits(here), got) < 2e-5
    assert error(got, logits(models.make("tied"))) > 2e-3, "the adapter does nothing"
    assert error(logits(ours.merge_and_unload()), got) < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_the_shared_values_train_once(name: str) -> None:
    """The gradient is the sum of both places', and stays one after a conversion of the model."""
    model = moved(adapted(fastadapt, name)).to(torch.float64)
    probe = torch.randn(96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (models.run(model, "tied") * probe).mean().backward()
    embedding = model.base_model.model.model.embed_tokens
    (key, p), *_ = [
        (k, p) for k, p in embedding.named_parameters() if p.requires_grad and p.grad is not None
    ]
    way = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    # norms of the model are in float32: a difference over 2e-3 has 1e-4 of rounding
    step = 1e-3
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            p += sign * step * way
            losses.append((models.run(model, "tied") * probe).mean())
            p -= sign * step * way
    slope = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close((p.grad * way).sum(), slope, rtol=1e-2, atol=1e-5)
    names = [k for k, q in model.named_parameters() if q is p]
    assert len(names) == 1, f"{key} is one parameter of the model"


def test_a_state_dict_of_the_model_comes_back() -> None:
    model, other = moved(adapted(fastadapt, "targets")), adapted(fastadapt, "targets")
    assert "base_model.model.lm_head.lora_A.default.weight" in model.state_dict()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        ("tied", {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": False},
         "`ensure_weight_tying` is not set to True"),
        ("tied", {"target_modules": ["q_proj"]}, "no tied modules are added"),
        ("llama", {"target_modules": ["lm_head"]}, "no tied modules were found in the model"),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1]},
         "the model does not have tied weights"),
    ],
)  # fmt: skip
def test_warnings(kind: str, fields: Any, match: str) -> None:
    config = fastadapt.LoraConfig(**{"ensure_weight_tying": True, **fields})
    with pytest.warns(FastAdaptWarning, match=match):
        fastadapt.get_peft_model(models.make(kind), config)


def test_refusals() -> None:
    tokens = {"embed_tokens": [1, 2], "lm_head": [3]}
    with pytest.raises(ConfigError, match="Cannot ensure weight tying"):
        adapted(fastadapt, "tokens", trainable_token_indices=tokens)
    with pytest.raises(UnsupportedError, match="ensure_weight_tying: a dora adapter"):
        adapted(fastadapt, "targets", use_dora=True)
    model = adapted(fastadapt, "tokens", trainable_token_indices=tokens, ensure_weight_tying=False)
    layers = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    assert [layer.token_indices["default"] for layer in layers] == [[1, 2], [3]]


def test_merged_weights_are_tied_again_where_they_are_equal() -> None:
    model = moved(adapted(fastadapt, "tokens"))
    want = logits(model)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert error(logits(merged), want) < 2e-5


def test_both_targeted_have_one_set_of_token_rows() -> None:
    config = fastadapt.TrainableTokensConfig(
        target_modules=["embed_tokens", "lm_head"], token_indices=[1, 2]
    )
    model = fastadapt.get_peft_model(models.make("tied"), config).base_model.model
    rows = [m.trainable_tokens_delta["default"] for m in (model.lm_head, model.model.embed_tokens)]
    assert rows[0] is rows[1]


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).double().norm() / want.double().norm())
