# SPDX-License-Identifier: Apache-2.0
"""What this machine has for fastadapt, and whether its ops compute what their references do."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastadapt.ops import (  # noqa: F401 (registers the ops)
    dropout,
    low_rank,
    low_rank_group,
    low_rank_mixed,
    native,
    nf4,
    reflect,
    rotate,
    row_norm,
    scale,
)
from fastadapt.ops.bits import Nf4, flatten
from fastadapt.ops.dispatch import IMPLEMENTATIONS, OPS, Op, triton_state, use
from fastadapt.patch.report import versions

if TYPE_CHECKING:
    from rich.console import Console

EXTRAS = {
    "bitsandbytes": ("qlora", "4-bit and 8-bit bases"),
    "triton": ("kernels", "GPU kernels"),
    "trl": ("train", "TRL's trainers"),
    "datasets": ("train", "TRL's trainers"),
    "matplotlib": ("train", "loss.png"),
    "gguf": ("train", "GGUF files"),
    "yaml": ("train", "fastadapt train --config"),
    "rich": ("train", "the command line"),
    "typer": ("train", "the command line"),
    "liger_kernel": ("liger", "Liger's fused loss"),
    "peft": ("dev", "the parity tests"),
}
DISTRIBUTIONS = {"yaml": "pyyaml", "liger_kernel": "liger-kernel"}
"""Where a package's distribution has another name."""


def examine() -> dict[str, Any]:
    """Versions, hardware, extras, and one row for each op and implementation.

    An op's row has ``why_not`` (why it cannot run here), or ``error``: the relative distance to
    the reference in float64, ``budget``: twice that of the reference itself, and ``ok``.
    ``healthy`` is False when an implementation that can run is outside its budget or fails.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for op in OPS.values() for row in _check(op, device)]
    return {
        "healthy": all(row.get("ok", True) for row in rows),
        "versions": versions(),
        "hardware": _hardware(),
        "native": native.why_not() or "loaded",
        "triton": triton_state(),
        "extras": _extras(),
        "ops": rows,
    }


def show(document: dict[str, Any], console: Console) -> None:
    """Print what ``examine`` found."""
    from rich.table import Table

    for title in ("versions", "hardware"):
        text = ", ".join(f"{k} {v}" for k, v in document[title].items() if v is not None)
        console.print(f"{title}: {text}", highlight=False, markup=False)
    console.print(f"native extension: {document['native']}", highlight=False, markup=False)
    console.print(f"triton: {document['triton']}", highlight=False, markup=False)
    table = Table("op", "implementation", "error", "budget", "state")
    for row in document["ops"]:
        if "error" in row:
            state = "ok" if row["ok"] else "WRONG"
            numbers = (f"{row['error']:.1e}", f"{row['budget']:.1e}")
        else:
            numbers = ("", "")
            state = row["why_not"] or f"FAILED: {row['failure']}"
        table.add_row(row["op"], row["implementation"], *numbers, state)
    console.print(table)
    for extra in document["extras"]:
        if extra["version"] is None:
            console.print(
                f"not installed: {extra['package']} ({extra['purpose']}): {extra['get']}",
                highlight=False,
                markup=False,
            )
    console.print("healthy" if document["healthy"] else "NOT HEALTHY: see the table")


def _hardware() -> dict[str, Any]:
    found: dict[str, Any] = {
        "platform": sys.platform,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpu_bfloat16": bool(torch.cpu._is_avx512_bf16_supported()),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = properties.name
        found["gpu_capability"] = f"{properties.major}.{properties.minor}"
        found["gpu_memory_mib"] = properties.total_memory // 2**20
        found["cuda"] = torch.version.cuda
    return found


def _extras() -> list[dict[str, str | None]]:
    rows = []
    for package, (extra, purpose) in EXTRAS.items():
        try:
            found = version(DISTRIBUTIONS.get(package, package))
        except PackageNotFoundError:
            found = None
        rows.append(
            {
                "package": package, "version": found, "purpose": purpose,
                "get": f"pip install 'fastadapt[{extra}]'",
            }
        )  # fmt: skip
    return rows


def _check(op: Op, device: torch.device) -> list[dict[str, Any]]:
    cases = _cases(device)
    if op.name not in cases:
        return []
    args = cases[op.name]
    truth = _flat(op.reference(*(_wide(arg) for arg in args)))
    budget = 2 * _distance(_flat(op.reference(*args)), truth)
    rows = []
    for implementation in IMPLEMENTATIONS:
        row: dict[str, Any] = {"op": op.name, "implementation": implementation}
        rows.append(row)
        why_not = op.why_not(implementation, *args)
        row["why_not"] = why_not
        if why_not is not None:
            continue
        try:
            with use(implementation):
                result = _flat(op.call(*args))
        except Exception as error:  # a doctor reports what is wrong, whatever it is
            row |= {"ok": False, "failure": f"{type(error).__name__}: {error}"}
            continue
        distance = _distance(result, truth)
        row |= {"error": distance, "budget": budget, "ok": distance <= budget}
    return rows


def _cases(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments for each op: 17 tokens, a (96, 128) NF4 weight, rank 8, dropout 0.25."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    m, n, k, r = 17, 96, 128, 8
    bits = Nf4(
        packed=torch.randint(256, (n * k // 2,), dtype=torch.uint8, generator=generator).to(device),
        absmax=(torch.rand(n * k // 64, generator=generator) + 0.5).to(device),
        code=torch.linspace(-1, 1, 16).to(device),
        nested_absmax=None, nested_code=None, offset=None, blocksize=64, nested_blocksize=256,
        n=n, k=k, dtype=torch.float32,
    )  # fmt: skip
    x, a, b, g = normal(m, k), normal(r, k), normal(n, r), normal(m, n)
    seed = torch.tensor([1234], device=device)
    f32, turn = torch.float32, normal(4, 8, 8)
    weight = flatten(bits)
    _, u = low_rank.low_rank_fwd_reference(x, None, a, b, 0.5, 0.25, seed, f32, f32, *weight)
    labels = torch.arange(m, device=device)
    lse = torch.stack([x.amax(1), x.logsumexp(1) - x.amax(1)], 1)
    pairs = [a, normal(3, k)], [b, normal(n, 3)]
    rows = ([0.5, 2.0], [0.25, 0.0], torch.tensor([1, 2], device=device))
    index = [1] * 5 + [-1] * 5 + [0] * 7
    stored = ([*weight[:6]] * 2, [*weight[6:10]] * 2, f32)
    return {
        "nf4_dequant": (*bits, f32),
        "dropout": (x, seed, 0.25, f32),
        "low_rank_fwd": (x, None, a, b, 0.5, 0.25, seed, f32, f32, *weight),
        "low_rank_bwd": (g, x, u, a, b, 0.5, 0.25, seed, f32, True, True, True, *weight),
        "low_rank_mixed_fwd": (x, None, *pairs, n, *rows, index, f32, f32, *weight),
        "low_rank_mixed_bwd": (g, x, u, *pairs, *rows, index, f32, True, [True] * 4, *weight),
        "low_rank_group_fwd": (x, [None, normal(n)], *pairs, *rows, f32, f32, *stored),
        "low_rank_group_bwd": (
            [g, normal(m, n)], x, normal(m, r + 3), *pairs, *rows, f32, True, [True] * 4, *stored,
        ),
        "row_norm": (a, b, 0.5, *weight),
        "scale_fwd": (x, normal(k), normal(k), normal(m, k), 1),
        "scale_bwd": (normal(m, k), x, normal(k), 1, True, True),
        "cross_entropy_fwd": (x, labels, -100),
        "cross_entropy_bwd": (x, labels, lse, normal(m), -100),
        "rotate_fwd": (x, turn, 2, f32),
        "rotate_bwd": (normal(m, k), x, turn, 2, True, True),
        "reflect_fwd": (x, a, normal(k, r), f32),
        "reflect_bwd": (normal(m, k), x, normal(m, r), a, normal(k, r), True, True, True),
    }  # fmt: skip


def _wide(arg: Any) -> Any:
    """An argument for the reference in float64."""
    if isinstance(arg, Tensor) and arg.is_floating_point():
        return arg.double()
    if isinstance(arg, list):
        return [_wide(each) for each in arg]
    return torch.float64 if arg is torch.float32 else arg


def _flat(result: Any) -> Tensor:
    parts = result if isinstance(result, tuple | list) else (result,)
    return torch.cat([part.double().flatten() for part in parts])


def _distance(result: Tensor, truth: Tensor) -> float:
    return float((result - truth).norm() / truth.norm())
