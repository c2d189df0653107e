# SPDX-License-Identifier: Apache-2.0
"""Our classes as subclasses of PEFT's too, where ``peft`` can be imported."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any


@cache
def joint(cls: Any) -> Any:
    """``cls`` joined with PEFT's class of that name, where ``peft`` can be imported."""
    peft = _peft()
    other = getattr(peft, cls.__name__, None)
    if other is None or issubclass(cls, other):
        return cls
    members = {"__module__": cls.__module__, "_own": cls, "__reduce_ex__": _reduce}
    return type(cls.__name__, (cls, other), members)


@cache
def _peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        return None
    try:
        import peft
    except ImportError:
        return None
    from fastadapt.patch import ecosystem

    ecosystem.register_layers()
    return peft


def _reduce(self: Any, protocol: Any) -> Any:
    """How a copy or a pickle is made: the joint class cannot be found by name, our own can."""
    return _rebuild, (type(self)._own,), self.__dict__


def _rebuild(cls: Any) -> Any:
    return object.__new__(joint(cls))
