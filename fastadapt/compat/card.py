# SPDX-License-Identifier: Apache-2.0
"""The README.md beside an adapter: what the hub needs to list it and to serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastadapt.config import PEFT_SCHEMA
from fastadapt.files import write_atomic

_HEADING = "### Framework versions"


def write_card(model: Any, folder: Any) -> None:
    """Write or update README.md in ``folder``; a card that is there keeps its text and its data.

    Sets library_name, tags ("lora", "transformers", the base's tags, base_model:adapter:...),
    base_model, and pipeline_tag for causal language models."""
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    root = model.get_base_model()
    card.data["library_name"] = "peft"
    types = {str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}
    tags = {"lora"} & {t.lower() for t in types}
    tags |= set(getattr(root, "model_tags", None) or [])
    config = getattr(root, "config", None)
    name = getattr(config, "_name_or_path", None)
    if any(c.__module__.startswith("transformers.") for c in type(root).__mro__):
        tags.add("transformers")
    if name:
        tags.add(f"base_model:adapter:{name}")
        card.data["base_model"] = name
    card.data["tags"] = sorted(tags)
    causal = any(c.__name__ == "PeftModelForCausalLM" for c in type(model).__mro__)
    if causal and not card.data.pipeline_tag:
        card.data.pipeline_tag = "text-generation"
    lines = card.text.splitlines()
    version = f"- PEFT {PEFT_SCHEMA}"
    if version not in lines:
        if _HEADING in lines:
            lines.insert(lines.index(_HEADING) + 2, version)
        else:
            lines += [_HEADING, "", version]
    card.text = "\n".join(lines)
    write_atomic(path, str(card).encode())
