# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's run: the same losses, cuts and files as PEFT's through all phases of its schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastadapt
from tests import tiny
from tests.parity import models

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

FIELDS = {
    "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 10, "deltaT": 2,
    "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip


def run(model: Any, allocate: Any) -> list[float]:
    """The losses of 10 steps."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for step in range(10):
        loss = models.loss(model, seed=step % 3)
        loss.backward()
        optimizer.step()
        allocate(step)
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def start(library: Any) -> Any:
    base = tiny.model()
    torch.manual_seed(5)
    return library.get_peft_model(base, library.AdaLoraConfig(**FIELDS))


def ranks(model: Any) -> dict[str, int]:
    return {
        k.replace(".default", "").removeprefix("base_model.model."): int((p != 0).sum())
        for k, p in model.named_parameters() if "lora_E" in k
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    theirs, ours = start(peft), start(fastadapt)
    want = run(theirs, theirs.base_model.update_and_allocate)
    got = run(ours, ours.base_model.update_and_allocate)
    assert got == pytest.approx(want, rel=1e-4)
    return theirs, ours


def test_budget_falls_as_in_peft(trained: tuple[Any, Any]) -> None:
    theirs, ours = trained
    assert ranks(ours) == ranks(theirs)
    assert sum(ranks(ours).values()) == 2 * len(ranks(ours))
    assert len(set(ranks(ours).values())) > 1, "the budget was not moved between layers"


def test_cut_files_load_both_ways(trained: tuple[Any, Any], tmp_path: Path) -> None:
    theirs, ours = trained
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    want = models.run(ours.eval())
    for library, folder in ((fastadapt, "theirs"), (peft, "ours"), (fastadapt, "ours")):
        loaded = library.PeftModel.from_pretrained(tiny.model(), str(tmp_path / folder)).eval()
        torch.testing.assert_close(models.run(loaded), want, rtol=1e-4, atol=1e-4)
    before = ours.state_dict()
    ours.load_adapter(str(tmp_path / "ours"), "default", is_trainable=True)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_patched_model_has_the_penalty_and_the_schedule() -> None:
    wrapped = start(fastadapt)
    base = tiny.model()
    torch.manual_seed(5)
    patched: Any = fastadapt.patch(base, fastadapt.AdaLoraConfig(**FIELDS))
    want = run(wrapped, wrapped.update_and_allocate)
    got = run(patched, patched.update_and_allocate)
    assert got == want
    plain = patched.unload()
    assert not plain._forward_hooks
    assert float(models.loss(plain)) == float(models.loss(tiny.model()))


def test_without_gradients_is_refused() -> None:
    with pytest.raises(fastadapt.LifecycleError, match="backward"):
        start(fastadapt).update_and_allocate(0)
