# SPDX-License-Identifier: Apache-2.0
"""What gradient checkpointing makes again in backward sees the rows that it saw in forward.

Which adapter each row takes, and from where on, stands in the layers during one forward pass of
the model and is gone when backward runs a block again. So while such a pass runs, the function
that transformers' blocks call for checkpointing binds it to what it is given to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

FUNCTION = "_gradient_checkpointing_func"


@contextmanager
def remembered(root: nn.Module, layers: list[Any]) -> Iterator[None]:
    """Inside, checkpointed blocks of ``root`` keep what ``layers`` know of their rows."""
    undo = remember(root, layers)
    try:
        yield
    finally:
        undo()


def remember(root: nn.Module, layers: list[Any]) -> Callable[[], None]:
    """The same without a ``with``: gives what ends it."""
    blocks = [m for m in root.modules() if FUNCTION in m.__dict__] if root.training else []
    held = [m.__dict__[FUNCTION] for m in blocks]
    known = _known(layers)
    for block, function in zip(blocks, held, strict=True):
        setattr(block, FUNCTION, partial(_bound, function, known))

    def undo() -> None:
        for block, function in zip(blocks, held, strict=True):
            setattr(block, FUNCTION, function)

    return undo


def _bound(checkpoint: Any, known: list[Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        before = _known([layer for layer, _, _ in known])
        _set(known)
        try:
            return function(*args, **kwargs)
        finally:
            _set(before)

    return checkpoint(run, *args, **kwargs)


def _known(layers: list[Any]) -> list[Any]:
    """(layer, its rows, its offsets); a module that is trained whole has no offsets."""
    return [(layer, layer.rows, getattr(layer, "offsets", None)) for layer in layers]


def _set(known: list[Any]) -> None:
    for layer, rows, offsets in known:
        layer.rows, layer.offsets = rows, offsets
