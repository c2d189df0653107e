# SPDX-License-Identifier: Apache-2.0
"""One reused CPU buffer per thread and dtype, for a weight that is decoded, multiplied, forgotten.

The next ``take`` on the same thread overwrites it: use it up before any other op runs.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_buffers = _Buffers()


def take(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor of this shape."""
    size = math.prod(shape)
    held = _buffers.by_dtype.get(dtype)
    if held is None or held.numel() < size:
        held = _buffers.by_dtype[dtype] = torch.empty(size, dtype=dtype)
    return held[:size].view(shape)
