# SPDX-License-Identifier: Apache-2.0
"""Freeze the parts of an adapter that is switched off, and thaw what trained before."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

Parts = Mapping[str, nn.Module | nn.Parameter | Tensor]


def freeze(parts: Parts) -> list[str]:
    """Nothing trains any more; the names of the parameters that did."""
    trained = [(n, p) for n, p in _parameters(parts) if p.requires_grad]
    for _, parameter in trained:
        parameter.requires_grad_(False)
    return [n for n, _ in trained]


def thaw(parts: Parts, trained: Collection[str]) -> None:
    """These train again. Others are left alone: layers may share a part, and one of them froze
    it."""
    for name, parameter in _parameters(parts):
        if name in trained:
            parameter.requires_grad_(True)


def _parameters(parts: Parts) -> Iterator[tuple[str, nn.Parameter]]:
    for key, part in parts.items():
        if isinstance(part, nn.Parameter):
            yield key, part
        elif isinstance(part, nn.Module):
            yield from part.named_parameters(key)
