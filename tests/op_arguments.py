# SPDX-License-Identifier: Apache-2.0
"""Calls of every registered op, for what PyTorch checks of an op."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import torch

from fastadapt import ops
from fastadapt.ops.bits import Nf4, flatten
from fastadapt.testing import GroupCase, LowRankCase

for _module in pkgutil.iter_modules(ops.__path__, "fastadapt.ops."):
    import_module(_module.name)  # each registers its ops

F32, BF16 = torch.float32, torch.bfloat16


def op_arguments() -> dict[str, list[tuple[Any, ...]]]:
    t = LowRankCase(m=4, bits="nf4").make()
    dense = LowRankCase(m=4, dtype=BF16, pair=F32).make()
    seed, u = torch.tensor([12]), torch.randn(4, 8)
    turn, thin = torch.randn(2, 4, 4), torch.randn(64, 8)
    image, channel = torch.randn(3, 5, 7), torch.randn(5)
    flat, nothing = flatten(t.bits), flatten(None)
    assert isinstance(t.bits, Nf4)
    low, high = torch.randn(2, 64), torch.randn(48, 2)
    pairs = [t.a, low], [t.b, high]
    index, plain = [1, -1, 0, 1], ([1.7, 0.5], [0.3, 0.0], torch.tensor([5, 6]))
    wide, labels = torch.randn(4, 8), torch.tensor([3, -100, 0, 63])
    groups = {}
    for case in (GroupCase(m=4, bits="nf4"), GroupCase(m=4, dtype=BF16, pair=F32)):
        x, made = case.make()
        held = [flatten(each.bits) for each in made]
        groups[case.bits] = (
            x,
            [each.bias for each in made],
            ([each.a for each in made], [each.b for each in made], [1.7, 0.5, 1.0]),
            (
                [v for each in held for v in each[:6]],
                [v for each in held for v in each[6:10]],
                held[0][10],
            ),
            [each.g for each in made],
        )
    drops = [0.3, 0.0, 0.5], torch.tensor([5, 6])
    x, biases, three, stored, gs = groups["nf4"]
    half = groups["dense"]
    hidden = torch.randn(4, 14)
    return {
        "nf4_dequant": [(*t.bits, F32), (*t.bits, BF16)],
        "dropout": [(t.x, seed, 0.3, BF16)],
        "row_norm": [(t.a, t.b, 1.7, *flat), (t.a, t.b, 1.7, *flatten(dense.bits))],
        "low_rank_fwd": [
            (t.x, t.bias, t.a, t.b, 1.7, 0.3, seed, F32, F32, *flat),
            (dense.x, None, dense.a, dense.b, 1.7, 0.0, None, BF16, BF16, *flatten(dense.bits)),
            (t.x, None, t.a, t.b, 1.7, 0.0, None, F32, F32, *nothing),
        ],
        "low_rank_bwd": [
            (t.g, t.x, u, t.a, t.b, 1.7, 0.3, seed, F32, True, True, True, *flat),
            (t.g, t.x, u, t.a, t.b, 1.7, 0.0, None, F32, True, False, False, *flat),
            (t.g, t.x, u, t.a, t.b, 1.7, 0.0, None, F32, False, True, False, *nothing),
        ],
        "low_rank_mixed_fwd": [
            (t.x, t.bias, *pairs, 48, *plain, index, F32, F32, *flat),
            (t.x, None, *pairs, 48, [1.0, 2.0], [0.0, 0.0], None, index, F32, BF16, *nothing),
        ],
        "low_rank_mixed_bwd": [
            (t.g, t.x, wide, *pairs, *plain, index, F32, True, [True] * 4, *flat),
            (
                t.g,
                t.x,
                wide,
                *pairs,
                *plain,
                index,
                F32,
                False,
                [True, False, False, True],
                *nothing,
            ),
        ],
        "cross_entropy_fwd": [(t.x, labels, -100), (t.x.to(BF16), labels, -100)],
        "cross_entropy_bwd": [(t.x, labels, torch.randn(4, 2), torch.randn(4), -100)],
        "low_rank_group_fwd": [
            (x, biases, *three, *drops, F32, F32, *stored),
            (half[0], half[1], *half[2], [0.0] * 3, None, BF16, BF16, *half[3]),
        ],
        "low_rank_group_bwd": [
            (gs, x, hidden, *three, *drops, F32, True, [True] * 6, *stored),
            (
                [gs[0], None, gs[2]],
                x,
                hidden,
                *three,
                [0.0] * 3,
                None,
                F32,
                False,
                [True, True, False, False, True, True],
                *stored,
            ),
        ],
        "rotate_fwd": [(t.x, turn, 1, F32), (t.x, turn, 2, BF16)],
        "scale_fwd": [
            (image, channel, None, None, 1),
            (image.to(BF16), channel, channel, image.to(BF16), 1),
        ],
        "scale_bwd": [
            (image, image + 1, channel, 1, True, True),
            (image.to(BF16), None, channel, 1, True, False),
            (image, image + 1, channel, 1, False, False),
        ],
        "rotate_bwd": [
            (torch.randn_like(t.x), t.x, turn, 1, True, True),
            (t.x.to(BF16), t.x, turn, 2, True, False),
            (t.x.to(BF16), t.x, turn, 2, False, True),
        ],
        "reflect_fwd": [(t.x, t.a, thin, F32), (t.x, t.a, thin, BF16)],
        "reflect_bwd": [
            (torch.randn_like(t.x), t.x, u, t.a, thin, True, True, True),
            (t.x.to(BF16), t.x, u, t.a, thin, False, True, False),
        ],
    }
