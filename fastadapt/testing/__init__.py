# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks share: the error budget, cases of the ops, and a tiny layer of every
format and kind under every method."""

from __future__ import annotations

from fastadapt.testing.budget import as_float64, budget, check, error
from fastadapt.testing.groups import GroupCase
from fastadapt.testing.layers import (
    FORMATS,
    IMPOSSIBLE,
    KINDS,
    METHOD_CASES,
    UNMERGEABLE,
    VARIANTS,
    OneLayer,
    adapted,
    adapter_parameters,
    applied,
    base_layer,
    config_of,
    dtype_of,
    exists,
    in_float64,
    layer_input,
    merged,
    move,
)
from fastadapt.testing.ops import (
    LowRankCase,
    LowRankInputs,
    decoded,
    drop_factors,
    moved,
    plain_low_rank,
    quantised,
)

__all__ = [
    "FORMATS", "IMPOSSIBLE", "KINDS", "METHOD_CASES", "UNMERGEABLE", "VARIANTS", "GroupCase",
    "LowRankCase", "LowRankInputs", "OneLayer", "adapted", "adapter_parameters", "applied",
    "as_float64", "base_layer", "budget", "check", "config_of", "decoded", "drop_factors",
    "dtype_of", "error", "exists", "in_float64", "layer_input", "merged", "move", "moved",
    "plain_low_rank", "quantised",
]  # fmt: skip
