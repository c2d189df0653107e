# SPDX-License-Identifier: Apache-2.0
"""Files: ours are PEFT's, key for key; what one library saves the other loads, to the bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastadapt
from tests import tiny
from tests.parity.variants import CASES, VARIANTS, adapted, outputs, peft, share
from tests.tiny import one_thread  # noqa: F401

pytestmark = pytest.mark.parity

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_files_are_the_same_and_load_both_ways(name: str, fmt: str, tmp_path: Path) -> None:
    kind = VARIANTS[name][0]
    theirs, ours = adapted(peft, name, fmt), adapted(fastadapt, name, fmt)
    share(theirs, ours)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
    want = load_file(tmp_path / "theirs" / TENSORS)
    got = load_file(tmp_path / "ours" / TENSORS)
    assert _facts(got) == _facts({k: v for k, v in want.items() if not repeated(k, want)})
    assert all(torch.equal(got[k], want[k]) for k in got)
    assert _config(tmp_path / "ours") == _config(tmp_path / "theirs")
    # the same library with the same values gives the same bits
    loaded = loads(peft, tmp_path / "ours", kind, fmt)
    assert torch.equal(outputs(loaded, kind), outputs(theirs, kind))
    loaded = loads(fastadapt, tmp_path / "theirs", kind, fmt)
    assert torch.equal(outputs(loaded, kind), outputs(ours, kind))
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("saver", [peft, fastadapt], ids=["peft-saves", "we-save"])
def test_folders_of_several_adapters(saver: Any, tmp_path: Path) -> None:
    other = fastadapt if saver is peft else peft
    model = two_adapters(saver)
    with quiet():
        model.save_pretrained(tmp_path)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("adapter_*")}
    assert found == {TENSORS, CONFIG, f"other/{TENSORS}", f"other/{CONFIG}"}
    loaded = loads(other, tmp_path, "llama", "fp32")
    loaded.load_adapter(str(tmp_path / "other"), "other")
    again = two_adapters(other)
    for name in ("default", "other"):
        loaded.set_adapter(name), again.set_adapter(name)
        assert torch.equal(outputs(loaded, "llama"), outputs(again, "llama"))


@pytest.mark.parametrize("saver", [peft, fastadapt], ids=["peft-saves", "we-save"])
def test_selected_adapters(saver: Any, tmp_path: Path) -> None:
    with quiet():
        two_adapters(saver).save_pretrained(tmp_path, selected_adapters=["other"])
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("adapter_*")}
    assert found == {f"other/{TENSORS}", f"other/{CONFIG}"}


def test_bin_files_load_in_peft(tmp_path: Path) -> None:
    """PEFT 0.21 writes no .bin any more, and reads it."""
    ours, theirs = adapted(fastadapt, "all-linear"), adapted(peft, "all-linear")
    share(theirs, ours)
    ours.save_pretrained(tmp_path, safe_serialization=False)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.bin", CONFIG, "README.md"}
    assert torch.equal(
        outputs(loads(peft, tmp_path, "llama", "fp32"), "llama"), outputs(theirs, "llama")
    )
    with pytest.warns(fastadapt.FastAdaptWarning, match="pickle"):
        loaded = fastadapt.PeftModel.from_pretrained(tiny.model(), tmp_path)
    assert torch.equal(outputs(loaded, "llama"), outputs(ours, "llama"))


def test_resized_vocabulary_is_saved_as_peft_does(tmp_path: Path) -> None:
    """New tokens without the new embeddings would be an adapter that cannot be loaded."""
    from transformers import AutoModelForCausalLM

    found = {}
    for library in (peft, fastadapt):
        base = AutoModelForCausalLM.from_pretrained(tiny.folder("llama"))
        base.resize_token_embeddings(tiny.VOCABULARY + 4, mean_resizing=False)
        with torch.no_grad():
            base.model.embed_tokens.weight[-4:] = 1
            base.lm_head.weight[-4:] = 2
        model = adapted(library, "names", base=base)
        folder = tmp_path / library.__name__
        with pytest.warns(UserWarning, match="resized"):
            model.save_pretrained(folder)
        found[library] = load_file(folder / TENSORS)
    assert _facts(found[fastadapt]) == _facts(found[peft])
    assert all(torch.equal(found[fastadapt][k], found[peft][k]) for k in found[peft])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_embeddings_are_saved_when_asked(kind: str, tmp_path: Path) -> None:
    name = "names" if kind == "llama" else "gpt2"
    found = []
    for library in (peft, fastadapt):
        folder = tmp_path / library.__name__
        adapted(library, name).save_pretrained(folder, save_embedding_layers=True)
        found.append(load_file(folder / TENSORS))
    assert _facts(found[0]) == _facts(found[1])


def two_adapters(library: Any) -> Any:
    model = adapted(library, "names")
    config = library.LoraConfig(r=2, target_modules=["o_proj", "q_proj"], use_rslora=True)
    torch.manual_seed(12)
    model.add_adapter("other", config)
    tiny.randomise(model)
    return model


def loads(library: Any, folder: Path, kind: str, fmt: str) -> Any:
    with quiet():
        return library.PeftModel.from_pretrained(tiny.model(kind, fmt), str(folder))


def quiet() -> Any:
    return warnings.catch_warnings(action="ignore")


def repeated(key: str, tensors: dict[str, Tensor]) -> bool:
    """PEFT writes the bias of a module that is trained whole up to three times (bias="all")."""
    parts = (".modules_to_save.bias", ".original_module.bias")
    return any(key.endswith(p) and key.removesuffix(p) + ".bias" in tensors for p in parts)


def _facts(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()}


def _config(folder: Path) -> dict[str, Any]:
    """The config's values; sets have no order, and PEFT corrects fan_in_fan_out for GPT-2 when it
    saves and again when it loads."""
    values = json.loads((folder / CONFIG).read_text())
    values.pop("fan_in_fan_out")
    return {k: sorted(v) if k.endswith("_modules") and isinstance(v, list) else v
            for k, v in values.items()}  # fmt: skip
