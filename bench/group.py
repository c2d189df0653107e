# SPDX-License-Identifier: Apache-2.0
"""Would it pay to run q, k, v and gate, up of each layer as one op?  The step of ``bench/train.py``
with and without, and the dense limit, in interleaved rounds.

    python bench/group.py                            into bench/results/cpu/group.json
    python bench/group.py --device cuda --shapes llama-8b-4 --sizes 1x16 1x128 1x2048

The grouped model is made for this: the first sibling computes all, the others take what is theirs.
That is right for these models alone, which call every sibling, in this order, on the same x.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import train
from report import machine
from torch import Tensor, nn

from fastadapt.layer import AdaptedLayer
from fastadapt.ops.low_rank_group import Member, low_rank_group
from fastadapt.ops.precision import compute_dtype

ALONE, GROUPED, LIMIT = "one by one", "grouped", "dense, no adapter"
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=sorted(train.SHAPES), default="smollm2-8")
    parser.add_argument("--sizes", nargs="+", default=["1x4", "1x32", "2x256"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/group.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    contenders, _ = train.build(args.shapes, dtype, dtype, device)
    alone = contenders[train.OURS].model
    models = {
        ALONE: alone, GROUPED: grouped(copy.deepcopy(alone)),
        LIMIT: contenders["no adapters, dense"].model,
    }  # fmt: skip
    rows = []
    for size in args.sizes:
        batch, length = map(int, size.split("x"))
        tokens = train.tokens(train.SHAPES[args.shapes]["vocab_size"], batch, length, device)
        seconds = rounds(models, tokens, args.rounds)
        median = {name: statistics.median(taken) for name, taken in seconds.items()}
        saved = {name: train.saved_for_backward(m, tokens) for name, m in models.items()}
        ratio = median[GROUPED] / median[ALONE]
        rows.append(
            {"size": size, "seconds": seconds, "median": median, "saved_bytes": saved,
             "grouped over one by one": ratio}
        )  # fmt: skip
        shown = "  ".join(f"{name} {1e3 * taken:.1f} ms" for name, taken in median.items())
        sys.stdout.write(f"{size}: {shown}  grouped takes {ratio:.3f} of one by one\n")
        sys.stdout.flush()
    document = {
        "shapes": args.shapes, "dtype": args.dtype, "lora": train.LORA, "rows": rows,
        "machine": machine(device),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def grouped(model: Any) -> Any:
    for module in model.modules():
        for names in SIBLINGS:
            if all(isinstance(getattr(module, name, None), AdaptedLayer) for name in names):
                _join([getattr(module, name) for name in names])
    return model


def _join(layers: list[Any]) -> None:
    left: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        compute = layers[0].frozen.weight.compute(x)
        y, *others = low_rank_group(
            x, [_member(layer) for layer in layers], compute=compute, out=compute_dtype(x)
        )
        left[:] = others
        return y

    layers[0].forward = first
    for layer in layers[1:]:
        layer.forward = lambda x: left.pop(0)


def _member(layer: Any) -> Member:
    pair = layer.adapters[layer.active_adapter].low_rank_pair()
    return Member(layer.frozen.bits(), layer.frozen.bias, pair.a, pair.b, pair.scale, pair.p)


def rounds(
    models: dict[str, nn.Module], tokens: dict[str, Tensor], count: int
) -> dict[str, list[float]]:
    """Seconds of forward and backward, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(count + 1):
        for name, model in models.items():
            start = time.perf_counter()
            train.forward_backward(model, tokens)
            if tokens["input_ids"].is_cuda:
                torch.cuda.synchronize()
            taken = time.perf_counter() - start
            model.zero_grad()
            if turn:
                seconds[name].append(taken)
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
