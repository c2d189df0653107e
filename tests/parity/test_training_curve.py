# SPDX-License-Identifier: Apache-2.0
"""Twenty steps give PEFT's loss curve, within what PEFT differs from itself.

How much that is, is measured: PEFT runs again from start values that are one rounding away, three
times. Curves drift apart as they go, so step t is judged by the largest difference up to step t.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastadapt
from tests import tiny
from tests.parity.variants import adapted, peft, share
from tests.tiny import one_thread  # noqa: F401

pytestmark = pytest.mark.parity

STEPS = 20


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["all-linear", "dora"])
def test_curve_is_the_same(name: str, optimizer: str) -> None:
    first = curve(peft, name, optimizer)
    again = torch.stack([curve(peft, name, optimizer, nudge=seed) for seed in (1, 2, 3)])
    band = (again - first).abs().amax(0).cummax(0).values
    ours = curve(fastadapt, name, optimizer)
    assert first[-1] < first[0]
    rounding = torch.finfo(torch.float32).eps * first
    assert ((ours - first).abs() <= 2 * band + rounding).all(), (ours - first, band)


def curve(library: Any, name: str, optimizer: str, nudge: int = 0) -> Tensor:
    """The losses. nudge: a seed for the directions in which start values move by one rounding."""
    model = adapted(library, name)
    share(adapted(peft, name), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if nudge:
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for parameter in trained:
                up = torch.randn(parameter.shape, generator=generator).sign() * float("inf")
                parameter.copy_(torch.nextafter(parameter, up))
    step = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    rule: Any = step(trained, lr=0.05 if optimizer == "sgd" else 2e-3)
    losses = []
    model.train()
    for i in range(STEPS):
        loss = model(**tiny.batch(rows=4, seed=i % 4)).loss
        rule.zero_grad()
        loss.backward()
        rule.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)
