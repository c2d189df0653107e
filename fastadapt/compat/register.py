# SPDX-License-Identifier: Apache-2.0
"""``register_peft_method``: a method of the caller's own beside those of PEFT."""

from __future__ import annotations

from typing import Any

from fastadapt.adapter import Adapter
from fastadapt.config import PeftConfig
from fastadapt.errors import ConfigError
from fastadapt.methods import METHODS, OWN, UNBUILT, method_of


def register_peft_method(
    *,
    name: str,
    config_cls: type[PeftConfig],
    model_cls: Any,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """Make configurations of ``peft_type=name.upper()`` known: to files, ``get_peft_config``, and,
    with a subclass of ``fastadapt.adapter.Adapter`` as ``model_cls``, to ``get_peft_model``.

    A tuner class written for PEFT holds layers of its own, which have no place here: with one, or
    with None, only the configuration is registered. ``is_mixed_compatible`` has no effect: every
    adapter of fastadapt can stand beside any other.

    Raises ConfigError (a ValueError) for a name or prefix of another form than PEFT's, KeyError for
    one that is taken."""
    if name.endswith("_"):
        raise ConfigError(
            f"Please pass the name of the PEFT method without '_' suffix, got {name}."
        )
    if not name.islower():
        raise ConfigError(
            f"The name of the PEFT method should be in lower case letters, got {name}."
        )
    own = model_cls if isinstance(model_cls, type) and issubclass(model_cls, Adapter) else None
    prefix = f"{name}_" if prefix is None else prefix
    if name.upper() in {*METHODS, *UNBUILT, *OWN}:
        raise KeyError(
            f"There is already PEFT method called '{name}', please choose a unique name."
        )
    taken = {method_of(t).prefix for t in METHODS}
    taken |= {cls.prefix for _, cls in OWN.values() if cls is not None}
    if prefix in taken:
        raise KeyError(
            f"There is already a prefix called '{prefix}', please choose a unique prefix."
        )
    held = getattr(model_cls, "prefix", None)
    if held is not None and held != prefix:
        raise ConfigError(
            f"Inconsistent prefixes found: '{prefix}' and '{held}' (they should be the same)."
        )
    OWN[name.upper()] = (config_cls, own)
