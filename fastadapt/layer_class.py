# SPDX-License-Identifier: Apache-2.0
"""PEFT's names of adapted layers: ``lora.Linear`` in print, ``Linear`` as a class."""

from __future__ import annotations

from functools import cache
from typing import Any

_KINDS = {"linear": "Linear", "conv1d_gpt2": "Linear", "embedding": "Embedding"}
_FORMS = {"bnb4": "4bit", "bnb8": "8bitLt"}


def name_of(layer: Any) -> str:
    """The class that PEFT has for an AdaptedLayer of this kind and format."""
    kind = _KINDS.get(layer.frozen.kind.name, type(layer.base_layer).__name__)
    return kind + _FORMS.get(layer.frozen.weight.name, "")


@cache
def class_of(base: Any, method: str, name: str) -> Any:
    """``base`` under another name: ``type(layer)`` tells methods and kinds apart."""
    members = {
        "__module__": f"fastadapt.tuners.{method}.layer", "_made_by": (base, method, name),
        "__reduce_ex__": lambda self, _: (_remake, self._made_by, self.__dict__),
    }  # fmt: skip
    return type(name, (base,), members)


def _remake(base: Any, method: str, name: str) -> Any:
    return object.__new__(class_of(base, method, name))
