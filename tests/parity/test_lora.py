# SPDX-License-Identifier: Apache-2.0
"""The same numbers as PEFT: start values from the same seed, logits, loss and every gradient.

The oracle is PEFT's own model in float64 (over the dequantised weights). We may err from it by
twice what PEFT errs; where a tensor's own error is small by chance, by twice PEFT's worst relative
error over all tensors of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastadapt
from fastadapt import testing
from tests import tiny
from tests.parity.variants import CASES, VARIANTS, adapted, oracle, peft, share
from tests.tiny import one_thread  # noqa: F401

pytestmark = pytest.mark.parity


class Step(NamedTuple):
    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_start_and_step_are_the_same(name: str, fmt: str) -> None:
    theirs, ours, exact = adapted(peft, name, fmt), adapted(fastadapt, name, fmt), oracle(name, fmt)
    check_start(theirs, ours, exact)
    share(theirs, ours, exact)
    check_step(theirs, ours, exact, VARIANTS[name][0])


def check_start(theirs: Any, ours: Any, exact: Any) -> None:
    """Names in order, shapes, dtypes, trainability, counts and values of a fresh adapter."""
    want, got = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert _facts(got) == _facts(want)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert type(ours).__name__ == type(theirs).__name__
    magnitudes = [k for k in want if "lora_magnitude" in k]
    for key in want.keys() - set(magnitudes):
        assert torch.equal(got[key], want[key]), key
    # m is a norm, which has roundings: held to float64 instead
    truth = dict(exact.named_parameters())
    for key in magnitudes:
        testing.check(got[key], want[key], truth[key], what=key)


def check_step(theirs: Any, ours: Any, exact: Any, kind: str) -> None:
    """Logits, loss and gradients of every trained parameter, away from the start values."""
    # (PEFT's DoRA on int8 takes one step and no second one)
    unused = [copy.deepcopy(theirs) for _ in range(4)]
    want, got, truth = (_step(model, kind) for model in (theirs, ours, exact))
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert got.grads.keys() == want.grads.keys() == trained
    assert got.logits.dtype == want.logits.dtype
    unit = torch.finfo(want.logits.dtype).eps
    assert _error(got.logits, truth.logits) <= 2 * _error(want.logits, truth.logits)
    # cross entropy moves by at most twice what a logit moves
    reach = 2 * (want.logits - truth.logits).abs().max() + unit * truth.loss
    assert (got.loss - truth.loss).abs() <= 2 * (want.loss - truth.loss).abs() + reach
    allowed = _allowed(want.grads, truth.grads, lambda keys: _noise(unused, kind, keys))
    for key, bound in allowed.items():
        assert got.grads[key].dtype == want.grads[key].dtype, key
        assert _error(got.grads[key], truth.grads[key]) <= bound, key


def test_rows_of_zero_do_not_become_nan() -> None:
    """DoRA divides by a row's norm: PEFT's logits are NaN here, ours are the base's."""
    base = tiny.model()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] = 0
    plain = base(**tiny.batch()).logits
    ours = adapted(fastadapt, "dora", base=base)
    got = ours(**tiny.batch()).logits
    assert torch.isfinite(got).all()
    exact = tiny.model().double()
    with torch.no_grad():
        exact.model.layers[0].self_attn.q_proj.weight[3] = 0
    testing.check(got, plain, exact(**tiny.batch()).logits)


def test_scale_of_an_extreme_alpha_is_refused() -> None:
    with pytest.raises(fastadapt.ConfigError, match="lora_alpha"):
        fastadapt.LoraConfig(lora_alpha=1e30)


def _facts(parameters: dict[str, Any]) -> list[Any]:
    return [(k, tuple(p.shape), p.dtype, p.requires_grad) for k, p in parameters.items()]


def _step(model: Any, kind: str) -> Step:
    result = model.train()(**tiny.batch(kind))
    result.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Step(result.logits.detach(), result.loss.detach(), grads)


def _error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).norm().item()


def _noise(models: list[Any], kind: str, keys: list[str]) -> float:
    """The largest of some gradients that are zero but for roundings, each model with the batch's
    tokens in another order: one draw of a rounding is half or twice the next one."""
    largest, batch = 0.0, tiny.batch(kind)
    for turn, model in enumerate(models):
        ids = {"input_ids": batch["input_ids"].roll(turn, dims=1)}
        model.train()(**{**batch, **ids}).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if n in keys}
        largest = max(largest, *(g.double().norm().item() for g in grads.values()))
    return largest


def _allowed(
    plain: dict[str, Tensor], truth: dict[str, Tensor], noise: Callable[[list[str]], float]
) -> dict[str, float]:
    """The error that each gradient may have. A gradient that is zero but for roundings (a key's
    bias under softmax) has no relative error: those share their largest absolute one."""
    sizes = {k: t.norm().item() for k, t in truth.items()}
    errors = {k: _error(plain[k], t) for k, t in truth.items()}
    floor = max(sizes.values()) * torch.finfo(torch.float32).eps ** 0.5
    worst = max(errors[k] / s for k, s in sizes.items() if s > floor)
    zero = [k for k, s in sizes.items() if s <= floor]
    least = noise(zero) if zero else 0.0
    return {k: 2 * (least if k in zero else max(errors[k], worst * s)) for k, s in sizes.items()}
