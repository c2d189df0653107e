# SPDX-License-Identifier: Apache-2.0
"""``layer.scaling`` and its like: adapter's name -> a plain value of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Values(dict[str, Any]):
    """A dict that scripts may write to. What is written reaches the adapter as well, whose compiled
    forward looks nothing up by name."""

    def __init__(
        self, key: str, adapters: Mapping[str, Any], values: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._key, self._adapters = key, adapters
        self.update(values or {})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        # not there yet while a copy or a pickle is read
        adapter = self.__dict__.get("_adapters", {}).get(name)
        if adapter is not None:
            adapter.hold({self._key: value})

    def update(self, *given: Any, **named: Any) -> None:
        for name, value in dict(*given, **named).items():
            self[name] = value
