# SPDX-License-Identifier: Apache-2.0
"""Where Triton can run, and how large a kernel's grid is."""

from __future__ import annotations

import os

import torch
import triton

OLDEST, NEWEST = (3, 5), (3, 9)
"""The releases that the kernels are compiled and interpreted with."""


def why_not_here(device: torch.device) -> str | None:
    """Why no Triton kernel can run on ``device``; None when one can.

    The interpreter (TRITON_INTERPRET=1) takes CPU tensors, for tests."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the tensors are on a {device.type}, Triton needs a GPU"
    if _version() < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    return None


def state() -> str:
    """What can be said of this triton: ok, too old, or newer than what was tested."""
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
    if _version() < OLDEST:
        return f"{triton.__version__} is older than {oldest}: not used, update it"
    if _version() > NEWEST:
        return f"{triton.__version__} is newer than {newest}, the newest that was tested"
    return f"{triton.__version__}, tested"


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def splits(tiles: int, depth: int, device: torch.device) -> int:
    """Into how many parts a reduction of ``depth`` blocks is cut, so that ``tiles`` independent
    outputs fill the GPU; the parts are summed afterwards, in a fixed order."""
    processors = 4
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-2 * processors // max(tiles, 1))
    return max(1, min(depth, wanted))
