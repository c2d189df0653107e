# SPDX-License-Identifier: Apache-2.0
"""Hot swapping in a compiled model: adapters of other ranks and scales, and nothing is compiled
again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from fastadapt.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

import fastadapt
from fastadapt.errors import LifecycleError, UnsupportedError
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

RANKS = ((4, 4.0), (2, 7.0), (6, 1.0), (4, 0.5))
"""(r, alpha) of the adapters that take turns; the first is compiled."""


class Net(nn.Module):
    """An embedding, a linear layer and convolutions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.up = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.conv, self.grouped = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 12, 1, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.tokens(ids)).tanh()
        return self.grouped(self.conv(x.transpose(1, 2)))  # type: ignore[no-any-return]


IDS = torch.arange(11).view(1, 11)


def adapter(r: int, alpha: float, targets: list[str], **more: Any) -> Any:
    config = fastadapt.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **more)
    model = fastadapt.get_peft_model(Net(), config).eval()
    tiny.randomise(model, seed=r)
    return model


@pytest.fixture
def graphs() -> Any:
    """How many graphs were compiled."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("target", "dora"),
    [("up", False), ("tokens", False), ("conv", False), ("grouped", False),
     ("up", True), ("tokens", True), ("conv", True)],
)  # fmt: skip
def test_nothing_is_compiled_again(target: str, dora: bool, graphs: Any, tmp_path: Path) -> None:
    want = []
    for i, (r, alpha) in enumerate(RANKS):
        made = adapter(r, alpha, [target], use_dora=dora)
        made.save_pretrained(tmp_path / str(i))
        with torch.no_grad():
            want.append(made(IDS))
    model = adapter(*RANKS[0], [target], use_dora=dora)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        close(compiled(IDS), want[0])
        first = graphs()
        assert first > 0
        for i in (1, 2, 3, 0):
            hotswap_adapter(compiled, str(tmp_path / str(i)), "default")
            close(compiled(IDS), want[i])
    assert graphs() == first
    assert min((a - b).abs().max() for a, b in itertools.pairwise(want)) > 1e-3


def close(got: Tensor, want: Tensor) -> None:
    # float32 sums of at most 24 terms, B multiplied by a ratio of scales
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_layers_that_the_next_adapter_lacks_are_silent(graphs: Any, tmp_path: Path) -> None:
    small = adapter(2, 3.0, ["up"])
    small.save_pretrained(tmp_path)
    model = adapter(4, 4.0, ["up", "conv", "tokens"])
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IDS)
        first = graphs()
        hotswap_adapter(compiled, str(tmp_path), "default")
        close(compiled(IDS), small(IDS))
    assert graphs() == first


def test_without_preparation_another_rank_is_compiled_again(graphs: Any, tmp_path: Path) -> None:
    """What the count above would see."""
    adapter(2, 3.0, ["up"]).save_pretrained(tmp_path)
    compiled = torch.compile(adapter(4, 4.0, ["up"]), backend="eager", dynamic=False)
    with torch.no_grad():
        compiled(IDS)
        first = graphs()
        hotswap_adapter(compiled, str(tmp_path), "default")
        compiled(IDS)
    assert graphs() > first


@pytest.mark.parametrize("target", ["up", "tokens", "conv", "grouped"])
def test_padding_changes_no_output_and_no_gradient(target: str) -> None:
    model = adapter(2, 3.0, [target])
    model(IDS).square().sum().backward()
    before = model(IDS).detach()
    norms = {n: p.grad.norm() for n, p in model.named_parameters() if p.grad is not None}
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model(IDS).square().sum().backward()
    close(model(IDS), before)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_embedding_A" in name:
            # rows of A that B does not read get none
            close(parameter.grad.norm(), norms[name])
            assert parameter.shape[0] == 8


def test_a_first_adapter_of_scale_zero(tmp_path: Path) -> None:
    other = adapter(4, 3.0, ["up"])
    other.save_pretrained(tmp_path)
    model = adapter(4, 0.0, ["up"])
    before = model(IDS)
    prepare_model_for_compiled_hotswap(model)
    close(model(IDS), before)
    hotswap_adapter(model, str(tmp_path), "default")
    close(model(IDS), other(IDS))


def test_ranks_that_cannot_be() -> None:
    model = adapter(4, 1.0, ["up", "grouped"])
    before = tiny.snapshot(model)
    with pytest.raises(LifecycleError, match=r"target rank 3.*larger \(4\)"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    with pytest.raises(UnsupportedError, match="multiple of the convolution's 2 groups, got 5"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    tiny.assert_same(model, before)
