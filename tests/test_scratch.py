# SPDX-License-Identifier: Apache-2.0
"""The reused buffer: it grows, it is shared by what fits, and threads do not share it."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from fastadapt.ops import scratch


def test_a_buffer_grows_and_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_buffers", scratch._Buffers())
    small = scratch.take((2, 3), torch.float32)
    large = scratch.take((20, 30), torch.float32)
    assert (small.shape, large.shape) == ((2, 3), (20, 30))
    assert scratch.take((5, 7), torch.float32).data_ptr() == large.data_ptr()
    half = scratch.take((20, 30), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.data_ptr() != large.data_ptr()


def test_a_thread_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_buffers", scratch._Buffers())
    mine, theirs = scratch.take((4,), torch.float32), []
    thread = Thread(target=lambda: theirs.append(scratch.take((4,), torch.float32)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()
