# SPDX-License-Identifier: Apache-2.0
"""Where in each row of a batch an adapter begins that waits for its invocation tokens (aLoRA).

A hook before the model's forward looks for the last place of the tokens in ``input_ids`` and gives
each layer the distance from there to the end of the row, its offset; None where the row does not
invoke the adapter. While the model goes on from a cache, with one new token or more, the places
found before stay. So generation needs nothing of its own, beams included.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import inject
from fastadapt.errors import FastAdaptWarning
from fastadapt.layer import AdaptedLayer
from fastadapt.recompute import remember

Places = list[int | None]


class Invocation:
    """The hooks of one model.

    starts: adapter -> in each row the place of the invocation, from the sequence's beginning;
    seen: how many tokens of the sequence were given so far; given: offsets of the caller's own."""

    def __init__(self) -> None:
        self.starts: dict[str, Places] = {}
        self.seen = 0
        self.given: Sequence[int | None] | None = None
        self.handles: list[Any] = []
        self._undo: Any = None

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look for the tokens, and tell the layers."""
        layers = _layers(model)
        waiting = _waiting(layers)
        if not waiting:
            return
        ids = kwargs.get("input_ids", next(iter(args), None))
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() in (1, 2):
            # (a cache by any name: past_key_values is cache in later versions of transformers)
            lengths = (v.get_seq_length() for v in kwargs.values() if hasattr(v, "get_seq_length"))
            self._look(waiting, ids.view(-1, ids.shape[-1]), int(next(lengths, 0)))
            offsets = {
                name: [None if s is None else self.seen - s for s in starts]
                for name, starts in self.starts.items()
            }
        elif self.given is not None:
            offsets = {name: list(self.given) for name in waiting}
        else:
            self.starts, self.seen, offsets = {}, 0, {}
            held = "only inputs_embeds are" if "inputs_embeds" in kwargs else "no input_ids are"
            _warn(
                f"Cannot calculate aLoRA offsets when {held} provided. Disabling aLoRA for this "
                "forward pass."
            )
        for layer in layers:
            layer.offsets = offsets
        self._undo = remember(model, layers)

    def after(self, model: nn.Module, args: Any, outputs: Any) -> None:
        """Offsets belong to one forward pass."""
        if self._undo is not None:
            self._undo()
            self._undo = None
            for layer in _layers(model):
                layer.offsets = None

    def _look(self, waiting: dict[str, list[int]], ids: Tensor, past: int) -> None:
        """The places in what came now, after ``past`` tokens, else those found before in the same
        sequence."""
        rows, length = ids.shape
        goes_on = 0 < past <= self.seen
        before = self.starts if goes_on or self.given is not None else {}
        self.seen = past + length
        for name, tokens in waiting.items():
            held = before.get(name, [])
            if self.given is not None:
                now = held or [None if o is None else self.seen - int(o) for o in self.given]
            else:
                now = [None if p is None else past + p for p in find(tokens, ids)]
                if len(held) == rows:
                    now = [h if n is None else n for n, h in zip(now, held, strict=True)]
            before = {**before, name: now}
        self.starts = before


def attach(root: nn.Module, made: inject.Plan) -> None:
    """Watch the forward passes of ``root`` where a planned adapter waits for its invocation."""
    if of(root) is None and any(a.invocation() for a in made.adapters.values()):
        hooks = Invocation()
        hooks.handles = [
            root.register_forward_pre_hook(hooks.before, with_kwargs=True),
            root.register_forward_hook(hooks.after, always_call=True),
        ]


def detach(root: nn.Module) -> None:
    """Stop that."""
    hooks = of(root)
    if hooks is not None:
        for handle in hooks.handles:
            handle.remove()


def of(root: nn.Module) -> Invocation | None:
    """The hooks of this model, if there are any."""
    owners = (getattr(h, "__self__", None) for h in root._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Invocation)), None)


@contextmanager
def given(root: nn.Module, offsets: Sequence[int | None] | None) -> Iterator[None]:
    """Inside, each row's adapter begins so many tokens before the end of the first input."""
    hooks = of(root)
    if hooks is None or offsets is None:
        yield
        return
    hooks.given, hooks.starts = offsets, {}
    try:
        yield
    finally:
        hooks.given, hooks.starts, hooks.seen = None, {}, 0


def find(tokens: Sequence[int], ids: Tensor) -> Places:
    """The last place of ``tokens`` in each row of ids: (rows, length); None where there is none."""
    count = len(tokens)
    if not 0 < count <= ids.shape[1]:
        return [None] * len(ids)
    wanted = torch.tensor(tokens, device=ids.device)
    here = (ids.unfold(1, count, 1) == wanted).all(-1)
    places = torch.arange(1, here.shape[1] + 1, device=ids.device)
    last: list[int] = (here * places).amax(1).tolist()
    return [p - 1 if p else None for p in last]


def _layers(model: nn.Module) -> list[AdaptedLayer]:
    return [layer for _, layer in inject.adapted(model)]


def _waiting(layers: list[Any]) -> dict[str, list[int]]:
    """Adapters that wait, of those that can run now -> their tokens."""
    found: dict[str, list[int]] = {}
    for layer in layers:
        if isinstance(layer, AdaptedLayer) and not layer.disable_adapters:
            names = layer.rows.names if layer.rows is not None else layer.active_adapters
            for name in {*names} & {*layer.adapters} - {*found}:
                tokens = layer.adapters[name].invocation()
                if tokens:
                    found[name] = tokens
    return found


def _warn(text: str) -> None:
    warnings.warn(text, FastAdaptWarning, stacklevel=5)
