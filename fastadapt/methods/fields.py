# SPDX-License-Identifier: Apache-2.0
"""Checks of configuration fields that several methods have."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from fastadapt.errors import ConfigError, FastAdaptWarning
from fastadapt.problems import note

MAX_COUNT = 1 << 28


def count(config: Any, *names: str, needs: str = "") -> None:
    """Each field is an integer from 1 to ``MAX_COUNT``; needs: what a message says instead."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            note(config, ConfigError(f"{name}: expected an integer, got {value!r}"))
        elif not 0 < value <= MAX_COUNT:
            usual = "should be a positive integer value but the value passed is"
            text = f"`{name}` {needs or usual} {value}{'.' if needs else ''}"
            note(config, ConfigError(text))


def rate(config: Any, name: str) -> None:
    """The field is a dropout probability."""
    value = getattr(config, name)
    if not isinstance(value, int | float) or not 0 <= value < 1:
        note(config, ConfigError(f"{name}: expected 0 <= p < 1, got {value!r}"))


def choice(config: Any, name: str, allowed: Sequence[Any]) -> None:
    """The field is one of ``allowed``."""
    value = getattr(config, name)
    if value not in allowed:
        note(config, ConfigError(f"{name}: expected one of {list(allowed)}, got {value!r}"))


def projections_kept(config: Any, names: str, key: str) -> None:
    """Warn when files will not hold the random projections."""
    if not config.save_projection:
        warnings.warn(
            f"save_projection=False: {names} are not saved, but made again from `{key}`; a later "
            "torch may draw other numbers",
            FastAdaptWarning,
            stacklevel=5,
        )
