# SPDX-License-Identifier: Apache-2.0
"""An adapter's file against a model: ``check`` compares them and raises one CheckpointError with
every problem, ``fill`` copies the tensors in."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import constants, inject, slots
from fastadapt.adapter_file import BASE_KEY, AdapterFile
from fastadapt.errors import CheckpointError, ConfigError, FastAdaptWarning, TargetError
from fastadapt.fingerprint import differences

_SHOWN = 12


@dataclass
class LoadReport:
    """What did not fit: PEFT's two lists, and every problem in words."""

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check(
    root: nn.Module,
    adapter: AdapterFile,
    *,
    strict: bool = True,
    name: str | None = None,
    ignore_mismatched_sizes: bool = False,
) -> LoadReport:
    """Compare a file with the model it is for, without changing the model.

    name: compare with this adapter of the model; None: with the adapter that the config would
    make; ignore_mismatched_sizes: tensors of another shape are left out, with a warning. Raises
    CheckpointError (``strict``) or warns, with every problem at once."""
    # the layers of a model are not replicated before it has the adapter
    alike = not getattr(adapter.config, "layer_replication", None) or name is not None
    problems = differences(adapter.metadata.get(BASE_KEY, ""), root) if alike else []
    if name is None:
        try:
            made = inject.plan(root, adapter.config, meta=True)
        except (ConfigError, TargetError) as error:
            raise CheckpointError(_message(adapter.path, [*problems, str(error)])) from error
        expected = slots.planned(root, made)
        paths = set(made.adapters)
    else:
        expected = slots.existing(root, adapter.config, name)
        paths = slots.adapted_paths(root)
    known = {**slots.embeddings(root, paths), **expected}
    missing = [k for k in expected if k not in adapter.shapes]
    unexpected = [k for k in adapter.shapes if k not in known]
    problems += [f"missing: {k}" for k in missing]
    problems += [
        f"unexpected: {k}{_near(k, expected) if i < _SHOWN else ''}"
        for i, k in enumerate(unexpected)
    ]
    shapes = {
        k: tuple(slot.filed(slot.tensor.detach()).shape)
        for k, slot in known.items()
        if k in adapter.shapes
    }
    other = {k: shape for k, shape in shapes.items() if shape != adapter.shapes[k]}
    misshapen = [
        f"shape of {k}: expected {shape}, got {adapter.shapes[k]}" for k, shape in other.items()
    ]
    problems += _vocabulary(root, adapter, other)
    # what fits is read, and nothing else: memory stays within the model's own sizes
    tensors = adapter.read([k for k, shape in shapes.items() if shape == adapter.shapes[k]])
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    problems += [f"not finite: {k}" for k in bad]
    problems += _torn(known, tensors)
    _warn_without_effect(adapter)
    report = LoadReport(missing, unexpected, problems + misshapen)
    if (misshapen and not ignore_mismatched_sizes) or (strict and problems):
        raise CheckpointError(_message(adapter.path, report.problems))
    if misshapen:
        warnings.warn(
            f"Some weights of {type(root).__name__} were not initialized from the model checkpoint "
            "and are being ignored because you passed `ignore_mismatched_sizes=True`: "
            + "; ".join(misshapen),
            FastAdaptWarning,
            stacklevel=3,
        )
    if missing and not strict:
        # PEFT's words, which scripts look for
        warnings.warn(
            f"Found missing adapter keys while loading the checkpoint: {missing}.",
            FastAdaptWarning,
            stacklevel=3,
        )
    if problems:
        warnings.warn(_message(adapter.path, report.problems), FastAdaptWarning, stacklevel=3)
    return report


def fill(root: nn.Module, adapter: AdapterFile, name: str) -> None:
    """Copy the tensors of a checked file into the adapter ``name`` of the model."""
    paths = slots.adapted_paths(root)
    layers = [root.get_submodule(path) for path in paths]
    constants.unshare(layers, name)
    places = {**slots.biases(root, paths), **slots.embeddings(root, paths)}
    places.update(slots.existing(root, adapter.config, name))
    forms: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for key, tensor in adapter.held.items():
            slot = places[key]
            part, suffix = slot.form
            if not part or slot.adapter is None:
                slot.tensor.copy_(tensor)
                continue
            held = forms.setdefault(slot.live, {})
            held[suffix] = tensor
            if len(held) == len(slot.adapter.file_forms(part)):
                slot.tensor.copy_(slot.adapter.from_file(part, held))
    adapter.held = {}
    constants.share(layers, name)


def _torn(known: dict[str, slots.Slot], tensors: dict[str, Tensor]) -> list[str]:
    """Keys whose tensors differ although the model has one tensor for them."""
    first: dict[tuple[int, str], str] = {}
    found = []
    for key, tensor in tensors.items():
        other = first.setdefault((id(known[key].tensor), known[key].form[1]), key)
        if other != key and not torch.equal(tensor, tensors[other]):
            found.append(f"two values of one tensor: {other} and {key}")
    return found


def _vocabulary(
    root: nn.Module, adapter: AdapterFile, misshapen: dict[str, tuple[int, ...]]
) -> list[str]:
    """Words for tensors of the embeddings that differ in the number of tokens alone."""
    sizes = slots.vocabulary(root)
    found = set()
    for key, expected in misshapen.items():
        tokens = next((n for p, n in sizes.items() if key.startswith(f"{slots.PREFIX}{p}.")), None)
        got = adapter.shapes[key]
        if tokens is None or len(got) != len(expected):
            continue
        differ = [g for g, e in zip(got, expected, strict=True) if g != e]
        if len(differ) == 1 and expected[got.index(differ[0])] == tokens:
            found.add((tokens, differ[0]))
    return [
        f"another vocabulary: the adapter's embeddings have {got} tokens, the model's {own}; call "
        f"model.resize_token_embeddings({got}) first, or load the base that it was trained on"
        for own, got in sorted(found)
    ]


def _warn_without_effect(adapter: AdapterFile) -> None:
    b = [t for k, t in adapter.held.items() if ".lora_B." in k or k.endswith(".lora_embedding_B")]
    whole = [k for k in adapter.held if ".lora_" not in k]
    if b and not whole and all(not t.any() for t in b):
        warnings.warn(
            f"{adapter.path}: every lora_B is zero, this adapter changes nothing",
            FastAdaptWarning,
            stacklevel=4,
        )


def _near(key: str, expected: dict[str, Any]) -> str:
    if len(expected) > 20_000:
        return ""
    close = difflib.get_close_matches(key, expected, 1, 0.9)
    return f" (near {close[0]})" if close else ""


def _message(path: Path, problems: list[str]) -> str:
    shown = problems[:_SHOWN]
    more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n  ".join([f"{path} does not fit this model:", *shown, *more])
