# SPDX-License-Identifier: Apache-2.0
"""LoRA on NF4 on a CPU against PEFT + bitsandbytes and against the limit, in interleaved rounds.

The limit is the frozen dense layer or model in the same dtype, forward + dx, no adapter. The
contenders take turns (A B C A B C) in one process, and only ratios of medians are read: a machine
with other work on it disturbs all three. Before anything is timed, our output and dx may be twice
as far from float64 as PEFT's are. Peak memory is that of one step in a process of its own.

``--readme`` measures nothing: it writes README's table from the file.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import train
from report import CPU_ROWS, cpu_readme, machine
from torch import Tensor, nn

import fastadapt

OURS, RIVAL, LIMIT = "fastadapt", "PEFT + bitsandbytes", "dense, no adapter"
WIDTH = 4096
ROUNDS = {1: 40, 32: 20, 512: 8}
STEPS = {"2x256": (2, 256, 8), "1x32": (1, 32, 24)}
BARS = dict(zip(CPU_ROWS, ((5, 1.1), (2.5, 1.2), (1.2, 1.15), (1.6, 1.3), (1.6, 1.3)), strict=True))
"""At least so many times faster than PEFT, at most so much of the limit's time."""
SAVED_BAR, MEMORY_OF = 0.5, "2x256"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/native.json"))
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--memory", choices=[OURS, RIVAL, LIMIT], help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.memory:
        sys.stdout.write(f"{peak_of_a_step(args.dtypes[0], args.memory)}\n")
        return 0
    if args.readme:
        cpu_readme(Path("README.md"), json.loads(args.out.read_text(encoding="utf-8")))
        return 0
    load = os.getloadavg()[0]
    rows = []
    for name in args.dtypes:
        rows += linears(getattr(torch, name)) + steps(name)
        rows.append(memory(name, args.threads))
    document = {
        "lora": train.LORA,
        "rows": rows,
        "machine": {**machine(torch.device("cpu")), "load_average_before": load},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{verdict(rows)}written: {args.out}\n")
    return 0


def verdict(rows: list[dict[str, Any]]) -> str:
    """Each row beside its bars."""
    lines = []
    for row in rows:
        found = []
        if row["what"] in BARS:
            least, most = BARS[row["what"]]
            faster, of_limit = row["ratios"].values()
            found += [(f"{faster:5.2f} x PEFT (at least {least})", faster >= least)]
            found += [(f"{of_limit:4.2f} of the limit (at most {most})", of_limit <= most)]
        if "saved_bytes" in row:
            share = row["saved_bytes"][OURS]["layers"] / row["saved_bytes"][RIVAL]["layers"]
            found += [(f"{share:4.2f} of PEFT's saved bytes (at most {SAVED_BAR})",
                       share <= SAVED_BAR)]  # fmt: skip
        if "peak_bytes" in row:
            share = row["peak_bytes"][OURS] / row["peak_bytes"][RIVAL]
            found += [(f"{share:4.2f} of PEFT's peak memory (below 1)", share < 1)]
        shown = "  ".join(f"{text} {'ok' if met else 'MISSED'}" for text, met in found)
        lines.append(f"{row['dtype']:9} {row['what']:55} {shown}\n")
    return "".join(lines)


def linears(dtype: torch.dtype) -> list[dict[str, Any]]:
    import peft

    fields = {"r": 16, "lora_alpha": 32, "target_modules": ["linear"]}
    ours = fastadapt.patch(one_layer(dtype), fastadapt.LoraConfig(**fields))
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**fields), one_layer(dtype))
    pair = theirs.linear.lora_A.default.weight, theirs.linear.lora_B.default.weight
    with torch.no_grad():
        pair[1].normal_(std=0.02)
        ours.linear.lora_A.default.weight.copy_(pair[0])
        ours.linear.lora_B.default.weight.copy_(pair[1])
    held = one_layer(dtype).linear
    from bitsandbytes.functional import dequantize_4bit

    w = dequantize_4bit(held.weight.data, held.weight.quant_state).to(dtype)
    exact = w.double() + 2 * pair[1].detach().double() @ pair[0].detach().double()
    rows = []
    for m, rounds in ROUNDS.items():
        x, g = torch.randn(m, WIDTH).to(dtype), torch.randn(m, WIDTH).to(dtype)
        truth = torch.cat([x.double() @ exact.t(), g.double() @ exact], 1)
        errors = {OURS: error(ours, x, g, truth), RIVAL: error(theirs, x, g, truth)}
        if errors[OURS] > 2 * errors[RIVAL]:
            raise RuntimeError(f"{m} tokens, {dtype}: errors against float64 {errors}")
        x.requires_grad_()

        def frozen(x: Tensor = x, g: Tensor = g) -> None:
            F.linear(x, w).backward(g)
            x.grad = None

        ways = {OURS: step_of(ours, x, g), RIVAL: step_of(theirs, x, g), LIMIT: frozen}
        row = {"what": f"linear {WIDTH} x {WIDTH}, {m} tokens", "dtype": str(dtype)[6:]}
        rows.append(finished({**row, "error": errors}, ways, rounds))
    return rows


def one_layer(dtype: torch.dtype) -> Any:
    import bitsandbytes.nn as bnb

    torch.manual_seed(0)
    root = nn.Module()
    layer = bnb.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=dtype, quant_type="nf4")
    w = (torch.randn(WIDTH, WIDTH) / WIDTH**0.5).to(dtype)
    layer.weight = bnb.Params4bit(
        w, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    ).to("cpu")
    root.linear = layer
    return root.train()


def step_of(model: Any, x: Tensor, g: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.linear(x).backward(g)
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    return step


def error(model: Any, x: Tensor, g: Tensor, truth: Tensor) -> float:
    """Of output and dx side by side, relative."""
    leaf = x.detach().requires_grad_()
    y = model.linear(leaf)
    y.backward(g)
    got = torch.cat([y.detach(), leaf.grad], 1).double()  # type: ignore[list-item]
    return float((got - truth).norm() / truth.norm())


def steps(name: str) -> list[dict[str, Any]]:
    dtype, device = getattr(torch, name), torch.device("cpu")
    contenders, oracle = train.build("smollm2-8", dtype, dtype, device)
    models = {
        OURS: contenders[train.OURS].model, RIVAL: contenders[train.RIVAL].model,
        LIMIT: contenders["no adapters, dense"].model,
    }  # fmt: skip
    vocabulary = train.SHAPES["smollm2-8"]["vocab_size"]
    rows = []
    for size, (batch, length, rounds) in STEPS.items():
        tokens = train.tokens(vocabulary, batch, length, device)
        agreed, parity = train.compare(models[OURS], models[RIVAL], oracle, tokens)
        if not agreed:
            raise RuntimeError(f"{size} tokens, {name}: {parity}")

        def step(model: Any, tokens: dict[str, Tensor] = tokens) -> Callable[[], None]:
            return lambda: (train.forward_backward(model, tokens), model.zero_grad())[1]

        row = {"what": f"step of 8 layers of SmolLM2-135M, {size} tokens", "dtype": name}
        row["saved_bytes"] = {k: train.saved_for_backward(m, tokens) for k, m in models.items()}
        rows.append(finished(row, {k: step(m) for k, m in models.items()}, rounds))
    return rows


def memory(name: str, threads: int) -> dict[str, Any]:
    """The most memory that a step takes, each contender in a process of its own."""
    peak = {}
    for side in (OURS, RIVAL, LIMIT):
        command = [sys.executable, __file__, "--memory", side, "--dtypes", name]
        done = subprocess.run(
            [*command, "--threads", str(threads)], capture_output=True, text=True, check=True
        )
        peak[side] = int(done.stdout.split()[-1])
    return {"what": f"peak resident bytes of a {MEMORY_OF} step", "dtype": name, "peak_bytes": peak}


def peak_of_a_step(name: str, side: str) -> int:
    """Bytes resident at the top of two steps, the model and the interpreter included; building
    the contenders is left out by starting the kernel's mark anew (Linux)."""
    dtype, device = getattr(torch, name), torch.device("cpu")
    contenders, _ = train.build("smollm2-8", dtype, dtype, device)
    key = {OURS: train.OURS, RIVAL: train.RIVAL, LIMIT: "no adapters, dense"}[side]
    model = contenders[key].model
    del contenders, _
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    batch, length, _rounds = STEPS[MEMORY_OF]
    tokens = train.tokens(train.SHAPES["smollm2-8"]["vocab_size"], batch, length, device)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _step in range(2):
        train.forward_backward(model, tokens)
        model.zero_grad()
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(v for v in status if v.startswith("VmHWM")).split()[1]) * 1024


def finished(
    row: dict[str, Any], ways: dict[str, Callable[[], None]], rounds: int
) -> dict[str, Any]:
    """The row with raw seconds, after one warm-up each, and the two ratios."""
    seconds: dict[str, list[float]] = {k: [] for k in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    median = {k: statistics.median(v) for k, v in seconds.items()}
    ratios = {
        "times faster than PEFT": median[RIVAL] / median[OURS],
        "of the limit": median[OURS] / median[LIMIT],
    }
    shown = "  ".join(f"{k} {v * 1e3:.2f} ms" for k, v in median.items())
    sys.stdout.write(
        f"{row['what']}, {row['dtype']}: {shown}  "
        + "  ".join(f"{v:.2f} {k}" for k, v in ratios.items()) + "\n"
    )  # fmt: skip
    sys.stdout.flush()
    return {**row, "seconds": seconds, "median": median, "ratios": ratios}


if __name__ == "__main__":
    raise SystemExit(main())
