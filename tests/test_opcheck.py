# SPDX-License-Identifier: Apache-2.0
"""What PyTorch asks of an op: schema, fake tensors, autograd, tracing; every registered op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.ops import dispatch, scratch
from tests.op_arguments import op_arguments

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, calls in op_arguments().items() for i in range(len(calls))]
)
def test_opcheck(name: str, index: int, implementation: str, device: str) -> None:
    args = _on(device, list(op_arguments()[name][index]))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor",
             "test_aot_dispatch_static", "test_aot_dispatch_dynamic")  # fmt: skip
    op = dispatch.OPS[name]
    # an op without such an implementation is checked with its reference, in the other case
    chosen = "reference" if op.why_not(implementation, *args) else implementation
    with dispatch.use(chosen):
        torch.library.opcheck(op.call, tuple(args), test_utils=tests)


def _on(device: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_on(device, each) for each in value]
    return value.to(device) if isinstance(value, Tensor) else value


def test_every_op_has_a_case_for_opcheck() -> None:
    assert set(op_arguments()) == set(dispatch.OPS)


def test_the_poison_works() -> None:
    assert torch.empty(3).isnan().all()
    assert scratch.take((2, 3), torch.float32).isnan().all()
