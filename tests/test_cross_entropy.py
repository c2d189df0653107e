# SPDX-License-Identifier: Apache-2.0
"""The loss of rows of logits: values and gradients against float64, and in a model's place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastadapt
from fastadapt.errors import KernelError
from fastadapt.ops import dispatch, native
from fastadapt.ops.cross_entropy import cross_entropy
from fastadapt.patch.loss import causal_lm_loss
from fastadapt.testing import check
from tests import tiny

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
pytestmark = pytest.mark.usefixtures("poisoned")
WAYS = ["reference", "native"] if native.isa() >= native.AVX512 else ["reference"]


def run(op: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    loss = op(leaf)
    loss.backward(g.to(loss.dtype))
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (3, 17), (7, 1000), (5, 4099)])
@pytest.mark.parametrize("way", WAYS)
def test_cross_entropy_and_its_gradient(
    way: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, g = (torch.randn(rows, columns) * 5).to(dtype), torch.rand(rows)
    labels = torch.randint(0, columns, (rows,))
    labels[1:2] = -100
    with dispatch.use(way):
        got = run(lambda x: cross_entropy(x, labels), x, g)
    plain = run(lambda x: F.cross_entropy(x.float(), labels, reduction="none"), x, g)
    oracle = run(lambda x: F.cross_entropy(x, labels, reduction="none"), x.double(), g)
    for name, *each in zip(("loss", "dx"), got, plain, oracle, strict=True):
        check(*each, what=name)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_stays_so(way: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, nan], [inf, 0.0], [-inf, 1.0], [-inf, -inf], [3e38, -3e38]])
    labels = torch.tensor([0, 0, 1, 0, 0])
    with dispatch.use(way):
        got, grad = run(lambda x: cross_entropy(x, labels), x, torch.ones(5))
    want, grad_want = run(lambda x: F.cross_entropy(x, labels, reduction="none"), x, torch.ones(5))
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(grad, grad_want, equal_nan=True)


def test_it_refuses_what_does_not_fit() -> None:
    with pytest.raises(KernelError, match="labels \\(rows,\\)"):
        cross_entropy(torch.randn(3, 4), torch.zeros(2, dtype=torch.int64))
    for label in (4, -1):
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            cross_entropy(torch.randn(1, 4), torch.tensor([label]))


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift-labels"])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
def test_the_loss_of_a_causal_model_is_that_of_transformers(
    items: Any, shifted: bool, dtype: torch.dtype
) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 9, 50).to(dtype), torch.randint(0, 50, (2, 9))
    labels[0, :4] = -100
    rest = {"shift_labels": labels} if shifted else {}
    got, want = (
        run(lambda x, f=f: f(x, labels, 50, items, **rest), logits, torch.tensor(1.0))
        for f in (causal_lm_loss, ForCausalLMLoss)
    )
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("wrapped", [False, True], ids=["patch", "get-peft-model"])
def test_a_model_has_it_while_it_has_adapters(wrapped: bool) -> None:
    base, batch = tiny.model(), tiny.batch()
    before = base.loss_function
    want = copy.deepcopy(base)(**batch).loss
    config = fastadapt.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = (fastadapt.get_peft_model if wrapped else fastadapt.patch)(base, config)
    assert base.loss_function is causal_lm_loss
    torch.testing.assert_close(model(**batch).loss, want)
    plain = model.unload()
    assert plain.loss_function is before
    assert "_loss_function" not in vars(plain)


def test_a_loss_of_the_users_own_stays() -> None:
    base = tiny.model()
    base.loss_function = F.cross_entropy
    model = fastadapt.patch(base, fastadapt.LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.loss_function is F.cross_entropy
    assert model.unload().loss_function is F.cross_entropy
