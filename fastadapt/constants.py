# SPDX-License-Identifier: Apache-2.0
"""``BufferDict``: tensors by name that never train, as ParameterDict holds those that do.

Layers may share a tensor (VeRA's projections), and ``Module.to`` would give each its own copy; here
one conversion of a model makes one new tensor of it. Adapters with equal constants share them too.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_CONVERTED: WeakKeyDictionary[Callable[[Tensor], Tensor], Any] = WeakKeyDictionary()
"""The function of a running conversion -> old tensor -> new one, as long as either is in use."""


class BufferDict(nn.Module):
    """name -> tensor, each a buffer; persistent: they are in the model's state dict."""

    def __init__(
        self,
        buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | BufferDict | None = None,
        persistent: bool = False,
    ) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]  # type: ignore[return-value]

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def keys(self) -> KeysView[str]:
        return self._buffers.keys()

    def values(self) -> ValuesView[Tensor]:
        return self._buffers.values()  # type: ignore[return-value]

    def items(self) -> ItemsView[str, Tensor]:
        return self._buffers.items()  # type: ignore[return-value]

    def pop(self, key: str) -> Tensor:
        """Take a tensor out."""
        tensor = self[key]
        del self[key]
        return tensor

    def clear(self) -> None:
        """Take all tensors out."""
        for key in list(self):
            del self[key]

    def update(
        self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | BufferDict
    ) -> None:
        """Put tensors in, of a mapping or of (name, tensor) pairs."""
        pairs: Any = buffers.items() if hasattr(buffers, "items") else buffers
        for key, tensor in pairs:
            self[key] = tensor

    def extra_repr(self) -> str:
        return "\n".join(f"({k}): Buffer of {tuple(b.shape)}, {b.dtype}" for k, b in self.items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        done = _CONVERTED.setdefault(fn, WeakIdKeyDictionary())
        for key, old in list(self.items()):
            if old not in done:
                done[old] = fn(old)
            self._buffers[key] = done[old]
        return self


def holder_for(part: Tensor | nn.Module, persistent: bool) -> nn.Module:
    """What holds parts of this form by adapter: of modules, of parameters, or of constants."""
    if isinstance(part, nn.Module):
        return nn.ModuleDict()
    return nn.ParameterDict() if isinstance(part, nn.Parameter) else BufferDict(None, persistent)


def share(layers: Iterable[nn.Module], name: str) -> None:
    """Let the adapter ``name`` use the constants of another where they are equal."""
    holders, equal = _holders(layers, name), {}
    found: dict[int, Tensor] = {}
    for holder in holders:
        own = holder[name]
        for other in (t for n, t in holder.items() if n != name and t is not own):
            pair = (id(own), id(other))
            if pair not in equal:
                equal[pair] = _equal(own, other)
            if equal[pair]:
                found.setdefault(id(own), other)
    for holder in holders:
        holder[name] = found.get(id(holder[name]), holder[name])


def unshare(layers: Iterable[nn.Module], name: str) -> None:
    """Give the adapter ``name`` constants that no other has, before they are written to."""
    holders = _holders(layers, name)
    copies: dict[int, Tensor] = {}
    for holder in holders:
        own = holder[name]
        if any(t is own for n, t in holder.items() if n != name) and id(own) not in copies:
            copies[id(own)] = own.clone()
    for holder in holders:
        holder[name] = copies.get(id(holder[name]), holder[name])


def _holders(layers: Iterable[nn.Module], name: str) -> list[BufferDict]:
    held = (m for layer in layers for m in layer.children() if isinstance(m, BufferDict))
    return [m for m in held if name in m]


def _equal(a: Tensor, b: Tensor) -> bool:
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and not a.is_meta and torch.equal(a, b)
