# SPDX-License-Identifier: Apache-2.0
"""Numbers that PEFT gets wrong, or does not warn of."""

from __future__ import annotations

import pytest
import torch

from fastadapt.base import FrozenLayer
from fastadapt.testing import FORMATS, adapted, base_layer, check, config_of, layer_input
from tests.test_laws import cost_of, merging_keeps_the_outputs, oracle_of
from tests.tiny import one_thread  # noqa: F401

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_of_zeros_under_dora(fmt: str) -> None:
    """Its direction is not defined and PEFT divides by its norm: here the row is the base's at the
    start, nothing is NaN, every parameter gets a finite gradient, and the merge is the forward."""
    base = base_layer(fmt, "linear")
    frozen = FrozenLayer(base)
    w = frozen.read()[0].clone()
    w[3] = 0
    frozen.write(w, None)
    x = layer_input(fmt, "linear", 3, 5)
    start = adapted(base, config_of("dora"), start=True)
    y = start(x)
    assert y.isfinite().all()
    check(y, start.base_layer(x), oracle_of(start, [], x), cost=cost_of(start, ["a0"], x, fmt))
    y.square().mean().backward()
    for part in (*start.parts_of("a0").values(),):
        for parameter in part.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
    again = adapted(base_layer(fmt, "linear"), config_of("dora"))
    again.frozen.write(w, None)
    merging_keeps_the_outputs(again, ["a0"], x, fmt)


def test_what_half_precision_adapters_lose() -> None:
    """The figure of the warning: steps of 2e-5 on N(0, 0.02) in bfloat16."""
    torch.manual_seed(0)
    wide = torch.randn(100_000) * 0.02
    half = wide.bfloat16()
    stays = (half + 2e-5 == half).float().mean().item()
    assert 0.6 < stays < 0.8
    assert not (wide + 2e-5 == wide).any()
