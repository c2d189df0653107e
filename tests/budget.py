# SPDX-License-Identifier: Apache-2.0
"""The error budget for whole models: many tensors after many products, judged together."""

from __future__ import annotations

from torch import Tensor


def worst_error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest over all tensors of || got - exact || / || exact ||."""
    return max(float((got[k].double() - v).norm() / v.double().norm()) for k, v in exact.items())


def assert_within_budget(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Our worst error against float64 is at most twice that of ``theirs``, the plain way."""
    assert list(ours) == list(theirs) == list(exact)
    for name in exact:
        assert ours[name].dtype == theirs[name].dtype, name
    assert worst_error(ours, exact) <= 2 * worst_error(theirs, exact)
