# SPDX-License-Identifier: Apache-2.0
"""Adapters of old PEFT releases load, and give what those releases gave (tests/golden/make.py)."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastadapt
from fastadapt.errors import FastAdaptWarning
from tests.golden import make

pytestmark = pytest.mark.golden

CASES = sorted(p.parent for p in make.HERE.glob("*/*/adapter_config.json"))


def test_there_are_at_least_four_releases() -> None:
    assert len({p.parent.name for p in CASES}) >= 4


def test_the_range_of_releases() -> None:
    """Of each method that a release has and that can be read, one adapter."""
    assert {p.parent.name for p in CASES} == set(make.VERSIONS)


def test_a_series_that_peft_summed_otherwise_is_said(tmp_path: Path) -> None:
    """PEFT itself loads such an OFT adapter without a word, and gives other outputs."""
    folder = shutil.copytree(make.HERE / "0.17.1" / "oft", tmp_path / "oft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_cayley_neumann": True}))
    with pytest.warns(FastAdaptWarning, match="Neumann series of PEFT <= 0.17"):
        fastadapt.PeftModel.from_pretrained(make.Tiny(), folder)


@pytest.mark.parametrize("folder", CASES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_the_outputs_of_an_old_release(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fastadapt.PeftModel.from_pretrained(make.Tiny(), folder)
    with torch.no_grad():
        got, plain = model(make.inputs()), make.Tiny()(make.inputs())
    want = load_file(folder / "output.safetensors")["output"]
    # float32 sums of at most 12 terms in another order, through four layers
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (want - plain).abs().max() > 1e-2, "the adapter changes something"
