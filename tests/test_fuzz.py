# SPDX-License-Identifier: Apache-2.0
"""Hostile adapter files: whatever the bytes, the load works or raises an error of ours, soon, and a
refused load leaves the model alone. FUZZ_INPUTS=100000 (``make fuzz``) for a long run."""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastadapt
from fastadapt.errors import FastAdaptError
from tests import tiny

INPUTS = int(os.environ.get("FUZZ_INPUTS", "2000"))
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
METHODS = ("LoraConfig", "IA3Config", "LoHaConfig", "VeraConfig")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**70, 1e308, float("nan"), "", "q_proj", "all-linear",
    "(q+)+$", "(", [], ["q_proj"], [""], [None], {}, {"q_proj": 3}, {"(.+)+": 2}, "x" * 5000,
)  # fmt: skip


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, bytes]]:
    """(tensors, config) of good adapters."""
    found = []
    for name in METHODS:
        fields: dict[str, Any] = {"target_modules": ["q_proj"]}
        if name == "IA3Config":
            fields["feedforward_modules"] = []
        torch.manual_seed(0)
        model = fastadapt.get_peft_model(tiny.Plain(), getattr(fastadapt, name)(**fields))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found.append(((folder / TENSORS).read_bytes(), (folder / CONFIG).read_bytes()))
    return found


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, cut, doubled or put in; mostly near the start, where headers are."""
    held = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(held), draw.choice((8, 200, 10**9))) or 1)
        how = draw.randrange(5)
        if how == 0 and held:
            held[at] = draw.randrange(256)
        elif how == 1:
            del held[at:]
        elif how == 2:
            del held[at : at + draw.randint(1, 16)]
        elif how == 3:
            held[at:at] = held[at : at + draw.randint(1, 64)]
        else:
            held[at:at] = draw.randbytes(draw.randint(1, 8))
    return bytes(held)


def reworded(data: bytes, draw: random.Random) -> bytes:
    """Some of a config's values replaced."""
    values = json.loads(data)
    for _ in range(draw.randint(1, 3)):
        values[draw.choice(sorted(values))] = draw.choice(VALUES)
    return json.dumps(values).encode()


def test_hostile_files_are_loaded_or_refused(
    seeds: list[tuple[bytes, bytes]], tmp_path: Path
) -> None:
    model = tiny.Plain()
    before = tiny.snapshot(model)
    for number in range(INPUTS):
        draw = random.Random(number)
        tensors, config = draw.choice(seeds)
        way = number % 3
        if way == 0:
            tensors = mutated(tensors, draw)
        else:
            config = (mutated if way == 1 else reworded)(config, draw)
        (tmp_path / TENSORS).write_bytes(tensors)
        (tmp_path / CONFIG).write_bytes(config)
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                fastadapt.PeftModel.from_pretrained(model, tmp_path)
            except FastAdaptError:
                tiny.assert_same(model, before)
            except Exception as error:
                error.add_note(f"input {number}: {config[:300]!r}")
                raise
            else:
                model = tiny.Plain()
        # no hang: far above what a pattern's time limit and a busy machine explain
        assert time.monotonic() - start < 30, number
