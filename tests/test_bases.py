# SPDX-License-Identifier: Apache-2.0
"""Which base an adapter is for: sizes, fingerprint, vocabulary."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastadapt
from fastadapt.errors import (
    CheckpointError,
    FastAdaptWarning,
    TargetError,
)
from tests import tiny
from tests.adapter_files import (
    TENSORS,
    adapted,
    logits,
    refused,
)
from tests.tiny import one_thread  # noqa: F401

# another base


def test_an_adapter_of_another_size(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    config = tiny.model().config
    config.hidden_size, config.intermediate_size = 32, 64
    config.head_dim = 8
    other = fastadapt.patch(
        LlamaForCausalLM(config), fastadapt.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    tiny.randomise(other)
    other.save_pretrained(tmp_path)
    refused(tmp_path, CheckpointError, "shape of", "wrong base: hidden_size is 64", "on 32")


def test_an_adapter_of_another_model_of_the_same_size(tmp_path: Path) -> None:
    """What PEFT loads without a word."""
    base = tiny.model()
    with torch.no_grad():
        base.model.embed_tokens.weight.normal_()
    model = fastadapt.patch(base, fastadapt.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tiny.randomise(model)
    model.save_pretrained(tmp_path)
    refused(tmp_path, CheckpointError, "wrong base: the embeddings are others")
    with pytest.warns(FastAdaptWarning, match="wrong base"):
        fastadapt.PeftModel.from_pretrained(tiny.model(), tmp_path, strict=False)


def test_an_adapter_of_another_architecture(saved: Path) -> None:
    for kind in ("gpt2", "bert"):
        model = tiny.model(kind)
        before = tiny.snapshot(model)
        with pytest.raises((TargetError, CheckpointError)):
            fastadapt.PeftModel.from_pretrained(model, saved)
        tiny.assert_same(model, before)


@pytest.mark.parametrize("fmt", ["bf16", "nf4", "int8"])
def test_the_same_base_in_another_format_is_the_same(fmt: str, saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAdaptWarning)
        fastadapt.PeftModel.from_pretrained(tiny.model(fmt=fmt), saved)


def test_a_resized_vocabulary_is_the_same_base(saved: Path) -> None:
    model = tiny.model()
    model.resize_token_embeddings(tiny.VOCABULARY + 16, mean_resizing=False)
    fastadapt.PeftModel.from_pretrained(model, saved)


@pytest.mark.parametrize("junk", ["", "{", "[]", "null", '{"embedding": 5}', '{"embedding": []}',
                                  '{"embedding": ["x"]}', "[" * 100_000])  # fmt: skip
def test_metadata_that_are_no_fingerprint_say_nothing(junk: str, saved: Path) -> None:
    save_file(load_file(saved / TENSORS), saved / TENSORS, metadata={"fastadapt_base": junk})
    fastadapt.PeftModel.from_pretrained(tiny.model(), saved)


# vocabularies


def bigger() -> Any:
    model = tiny.model()
    model.resize_token_embeddings(tiny.VOCABULARY + 16, mean_resizing=False)
    return model


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]},
     {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
     {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}],
    ids=["lora-on-embedding", "lora-on-head", "saved-head", "saved-both"],
)  # fmt: skip
@pytest.mark.parametrize("wider", ["adapter", "model"])
def test_embeddings_of_another_vocabulary_say_so(
    fields: dict[str, Any], wider: str, tmp_path: Path
) -> None:
    """PEFT lists the shapes; the reason and the remedy are ours."""
    sizes = [tiny.VOCABULARY + 16, tiny.VOCABULARY]
    made = bigger() if wider == "adapter" else tiny.model()
    source = fastadapt.patch(made, fastadapt.LoraConfig(r=4, **fields))
    tiny.randomise(source)
    source.save_pretrained(tmp_path)
    model = tiny.model() if wider == "adapter" else bigger()
    before = tiny.snapshot(model)
    theirs, own = sizes if wider == "adapter" else sizes[::-1]
    with pytest.raises(CheckpointError, match=f"have {theirs} tokens, the model's {own}; call"):
        fastadapt.PeftModel.from_pretrained(model, tmp_path)
    tiny.assert_same(model, before)
    model.resize_token_embeddings(theirs, mean_resizing=False)
    fastadapt.PeftModel.from_pretrained(model, tmp_path)


def test_a_base_of_several_files_is_one_base(saved: Path, tmp_path: Path) -> None:
    """The fingerprint is the model's, however its weights lie on the disk."""
    from transformers import LlamaForCausalLM

    tiny.model().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAdaptWarning)
        model = fastadapt.PeftModel.from_pretrained(base, saved)
    assert torch.equal(logits(model.eval()), logits(adapted()))
