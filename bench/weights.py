# SPDX-License-Identifier: Apache-2.0
"""Random 4-bit weights without bitsandbytes, the linears of Llama-3-8B, and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastadapt.ops.bits import Nf4

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022833334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

LLAMA_8B = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
    "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
}  # fmt: skip
QUICK = {"q": (128, 128), "k": (64, 128), "down": (128, 192)}
"""name -> (n, k); QUICK rehearses."""


def random_nf4(n: int, k: int, device: torch.device, dtype: torch.dtype) -> Nf4:
    """Uniform codes under nested absmax, of about the size of a trained weight."""
    blocks = n * k // 64
    g = torch.Generator().manual_seed(n + k)
    return Nf4(
        torch.randint(0, 256, (n * k // 2, 1), generator=g, dtype=torch.uint8).to(device),
        torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8).to(device),
        torch.tensor(NF4, device=device),
        (torch.rand((blocks + 255) // 256, generator=g) / k**0.5).to(device),
        torch.linspace(-1, 1, 256, device=device), torch.full((), 2 / k**0.5, device=device),
        64, 256, n, k, dtype,
    )  # fmt: skip


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """One call, by the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def flush(device: torch.device) -> None:
    """Out of the L2: what a layer finds when a whole model ran before it."""
    if device.type == "cuda":
        torch.empty(256 << 20, dtype=torch.uint8, device=device).zero_()
