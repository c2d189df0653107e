# SPDX-License-Identifier: Apache-2.0
"""Forward + backward of Llama-3-8B's seven linears under r 16, in interleaved rounds.

    python bench/layers.py --tokens 512 --dropout 0.05 --out x.json
    python bench/layers.py --device cpu --quick          a rehearsal, whose times mean nothing

Contenders: fastadapt (LoRA; DoRA at its side), PEFT + bitsandbytes where both are installed, and
the frozen bf16 product without adapters, which is the limit. Raw seconds are kept; the table shows
medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import machine
from torch import Tensor, nn
from weights import LLAMA_8B, QUICK, flush, seconds

import fastadapt

BF16 = torch.bfloat16
LIMIT = "frozen bf16"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="*", default=[16, 128, 512, 2048, 8192])
    parser.add_argument("--dropout", type=float, nargs="*", default=[0.0, 0.05])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.rounds = [3, 16], 2
    device, sizes = torch.device(args.device), QUICK if args.quick else LLAMA_8B
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for p in args.dropout:
        layers = contenders(sizes, p, device, absent)
        for m in args.tokens:
            samples: dict[str, list[float]] = {name: [] for name in layers}
            calls = {name: step(stack, m, device) for name, stack in layers.items()}
            for round_ in range(args.rounds + 2):
                for name, call in calls.items():
                    flush(device)
                    taken = seconds(call, device)
                    if round_ >= 2:  # two to warm up
                        samples[name].append(taken)
            rows.append({"tokens": m, "dropout": p, "seconds": samples})
            write(args.out, rows, absent, device)
            print(line(rows[-1]), flush=True)
    for name, reason in absent.items():
        print(f"{name} was not measured: {reason}")
    return 0


def contenders(
    sizes: dict[str, tuple[int, int]], p: float, device: torch.device, absent: dict[str, str]
) -> dict[str, nn.ModuleDict]:
    """name -> the seven layers; ``absent`` takes who cannot be here and why."""
    dense = nn.ModuleDict({n: nn.Linear(k, out, bias=False) for n, (out, k) in sizes.items()})
    found = {LIMIT: dense.to(device, BF16).requires_grad_(False)}
    config = {"r": 16, "lora_alpha": 32, "lora_dropout": p, "target_modules": list(sizes)}
    try:
        import bitsandbytes.nn as bnb
    except ImportError as error:
        absent["everything on NF4"] = str(error)
        return found

    def quantised() -> nn.ModuleDict:
        held = nn.ModuleDict()
        for name, (out, k) in sizes.items():
            layer = bnb.Linear4bit(k, out, bias=False, compute_dtype=BF16, quant_type="nf4")
            layer.weight = bnb.Params4bit(
                dense[name].weight.detach().cpu(), requires_grad=False, quant_type="nf4"
            )
            held[name] = layer
        return held.to(device)

    for name, extra in (("fastadapt", {}), ("fastadapt DoRA", {"use_dora": True})):
        stack = quantised()
        fastadapt.patch(stack, fastadapt.LoraConfig(**config, **extra))
        found[name] = stack.train()
    try:
        import peft

        rival = peft.get_peft_model(quantised(), peft.LoraConfig(**config))
        found["PEFT + bitsandbytes"] = rival.base_model.model.train()
    except ImportError as error:
        absent["PEFT + bitsandbytes"] = str(error)
    return found


def step(stack: nn.ModuleDict, m: int, device: torch.device) -> Callable[[], None]:
    """Every layer, forward and backward, with an input that wants its gradient."""
    inputs: dict[int, Tensor] = {}
    for layer in stack.values():
        base = getattr(layer, "base_layer", layer)
        k = base.in_features
        inputs.setdefault(k, torch.randn(m, k, device=device, dtype=BF16).requires_grad_())

    def run() -> None:
        for layer in stack.values():
            k = getattr(layer, "base_layer", layer).in_features
            with torch.autocast(device.type, dtype=BF16):
                y = layer(inputs[k])
            y.backward(torch.ones_like(y))
        for held in (*inputs.values(), *stack.parameters()):
            held.grad = None

    return run


def line(row: dict[str, Any]) -> str:
    medians = {name: statistics.median(s) for name, s in row["seconds"].items()}
    shown = [f"{name} {1e3 * t:.3f} ms ({t / medians[LIMIT]:.2f})" for name, t in medians.items()]
    return f"{row['tokens']} tokens, dropout {row['dropout']}: " + "; ".join(shown)


def write(
    out: Path | None, rows: list[dict[str, Any]], absent: dict[str, str], device: torch.device
) -> None:
    """After every row: a run that is cut off leaves what it had."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"rows": rows, "absent": absent, "machine": machine(device)}
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
