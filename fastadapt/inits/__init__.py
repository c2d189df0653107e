# SPDX-License-Identifier: Apache-2.0
"""Start values of a low-rank pair, one file each: W -> a, b and what of W stays in the base.

``init_lora_weights`` names one; a new one is its file and its line in ``INITS``.
"""

from __future__ import annotations

import difflib
from importlib import import_module

from fastadapt.errors import ConfigError
from fastadapt.inits.init import Init, Standard

INITS = {
    "gaussian": "init:Gaussian",
    "orthogonal": "orthogonal:Orthogonal",
    "pissa": "pissa:Pissa",
    "olora": "olora:Olora",
    "mica": "mica:Mica",
    "loftq": "loftq:LoftQ",
    "lora_ga": "lora_ga:LoraGA",
    "eva": "eva:Eva",
    "corda": "corda:Corda",
}
"""Name -> module of this package : class."""

_NITER = "pissa_niter_"


def init_of(name: bool | str) -> Init:
    """The start that ``init_lora_weights`` asks for. Raises ConfigError for an unknown name."""
    if isinstance(name, bool):
        return Standard() if name else Init()
    key = name.lower()
    niter = key.removeprefix(_NITER) if key.startswith(_NITER) else ""
    if niter.isdigit():
        key = "pissa"
    if key not in INITS:
        close = difflib.get_close_matches(key, INITS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"Unknown initialization init_lora_weights={name!r}: expected True, False, "
            f"'{_NITER}N' or one of {sorted(INITS)}{hint}"
        )
    module, _, cls = INITS[key].partition(":")
    made: Init = getattr(import_module(f"fastadapt.inits.{module}"), cls)()
    made.iterations = int(niter) if niter.isdigit() else None
    return made
