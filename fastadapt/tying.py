# SPDX-License-Identifier: Apache-2.0
"""Weights that modules share with the input embedding, and adapters that are shared the same way.

``ensure_weight_tying`` gives the tied modules the embedding's adapter, not one of their own.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastadapt.errors import ConfigError, FastAdaptWarning
from fastadapt.targets import full_match, is_adapted, walk

EMBEDDINGS = ("embed_tokens", "lm_head")
_INNER = re.compile(r"(?:token_adapter\.)?base_layer\.")
_TROUBLE = (
    "This can lead to complications, for example when merging the adapter or converting your model "
    "to formats other than safetensors."
)


@dataclass(frozen=True)
class Ties:
    """source: the path of the input embedding; targets: paths whose adapters are its; saved: paths
    whose trained copies have its weight."""

    source: str = ""
    targets: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()


def resolve(model: nn.Module, config: Any) -> tuple[Any, Ties]:
    """The configuration with the input embedding in the place of what is tied to it, when it asks
    for that. Warns, in PEFT's words, where a tied module gets an adapter of its own."""
    saved = list(config.modules_to_save or ())
    wanted = config.target_modules
    is_saved = any(m.rpartition(".")[2] in EMBEDDINGS for m in saved)
    if isinstance(wanted, str):
        is_target = any(full_match(wanted, name) for name in EMBEDDINGS)
    else:
        is_target = any(m.rpartition(".")[2] in EMBEDDINGS for m in wanted or ())
    ensure = getattr(config, "ensure_weight_tying", None)
    if not (ensure or is_saved or is_target):
        return config, Ties()
    tied = tied_paths(model)
    if not ensure:
        if tied:
            _warn(
                "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
                + ("no implementation exists to tie the adapters. " if ensure is None
                   else "`ensure_weight_tying` is not set to True. ") + _TROUBLE
            )  # fmt: skip
        return config, Ties()
    if not tied:
        _warn("You have requested `ensure_weight_tying`, but no tied modules were found in the "
              "model")  # fmt: skip
        return config, Ties()
    source = input_embedding(model) or ""
    if is_saved:
        kept = [m for m in dict.fromkeys([*saved, source]) if not any(_has(t, m) for t in tied)]
        return dataclasses.replace(config, modules_to_save=kept), Ties(source, saved=tuple(tied))
    if is_target:
        if isinstance(wanted, str):
            names: Any = rf"(?:{wanted}|^{re.escape(source)}$)"
        else:
            names = {m for m in wanted or () if not any(_has(t, m) for t in tied)} | {source}
        return dataclasses.replace(config, target_modules=names), Ties(source, targets=tuple(tied))
    if not getattr(config, "trainable_token_indices", None):
        _warn("You have requested `ensure_weight_tying`, but no tied modules are added in either "
              "`modules_to_save` or `target_modules`")  # fmt: skip
    return config, Ties()


def tied_paths(model: nn.Module) -> list[str]:
    """The modules whose weight is the input embedding's, adapted or not."""
    paths = dict(walk(model))
    found = []
    for name in tied_with_embedding(model):
        while name and not (name in paths and (is_adapted(paths[name]) or _is_last(name, paths))):
            name = name.rpartition(".")[0]
        if name:
            found.append(name)
    return found


def tie_again(model: Any, paths: list[str]) -> None:
    """Modules whose merged weight is the input embedding's to the bit share it again."""
    source = input_embedding(model)
    weight = getattr(model.get_submodule(source), "weight", None) if source else None
    for path in paths if isinstance(weight, nn.Parameter) else ():
        module: Any = model.get_submodule(path)
        own = getattr(module, "weight", None)
        if isinstance(own, nn.Parameter) and own is not weight and _same(own, weight):
            module.weight = weight


def tied_with_embedding(base: Any) -> list[str]:
    """Paths of the modules whose weight is the input embedding's; none where the config says
    ``tie_word_embeddings=False``. What adapted layers hold is named as it is now."""
    keys = getattr(base, "_tied_weights_keys", None)
    if keys is None or getattr(getattr(base, "config", None), "tie_word_embeddings", None) is False:
        return []
    if not isinstance(keys, dict):
        return _owners(keys)
    if not hasattr(base, "get_input_embeddings"):
        raise ConfigError(
            "`_tied_weights_keys` is a dict: expected a model with get_input_embeddings, which "
            f"says whose weight is tied, got {type(base).__name__}"
        )
    ties = {}
    for path, module in base.named_modules():
        own = getattr(module, "_tied_weights_keys", None)
        if isinstance(own, dict):
            at = f"{path}." if path else ""
            ties.update({at + tied: at + source for tied, source in own.items()})
    wanted = {id(p) for p in base.get_input_embeddings().parameters()}
    every = base.named_parameters(remove_duplicate=False)
    now = {_INNER.sub("", name): name for name, p in every if id(p) in wanted}
    return _owners(now.get(tied, tied) for tied, source in ties.items() if source in now)


def input_embedding(model: Any) -> str | None:
    """The path of the input embedding, where the model says it."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((p for p, m in walk(model) if m is found), None)


def _is_last(name: str, paths: dict[str, nn.Module]) -> bool:
    return not any(True for _ in paths[name].named_children())


def _has(path: str, name: str) -> bool:
    """The name is the path, or a part of it between dots."""
    return f".{name}." in f".{path}."


def _same(one: Any, other: Any) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and bool(torch.equal(one, other))


def _owners(names: Any) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in names})


def _warn(text: str) -> None:
    warnings.warn(text, FastAdaptWarning, stacklevel=5)
