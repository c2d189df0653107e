# SPDX-License-Identifier: Apache-2.0
"""What a result says beside its figures, and the table of ``train.py``."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastadapt

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton")


CPU_ROWS = {
    "linear 4096 x 4096, 1 tokens": "linear 4096 x 4096, 1 token",
    "linear 4096 x 4096, 32 tokens": "32 tokens",
    "linear 4096 x 4096, 512 tokens": "512 tokens",
    "step of 8 layers of SmolLM2-135M, 2x256 tokens": "a step of 8 layers of SmolLM2-135M's "
    "shapes, 2 x 256 tokens, dropout 0.05",
    "step of 8 layers of SmolLM2-135M, 1x32 tokens": "the same, 1 x 32 tokens",
}
"""The rows of ``cpu.py`` -> what README calls them."""
CPU_MARKS = "<!-- from bench/results/cpu/native.json -->\n", "<!-- end -->\n"


def cpu_table(document: dict[str, Any]) -> str:
    """README's table of a result of ``cpu.py``, in Markdown."""
    found = {(row["what"], row["dtype"]): row for row in document["rows"]}
    dtypes = [d for d in ("bfloat16", "float32") if any(key[1] == d for key in found)]
    head = [f"{d}: {column}" for d in dtypes for column in ("against PEFT", "of the dense time")]
    lines = ["| | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for what, name in CPU_ROWS.items():
        cells = [name]
        for dtype in dtypes:
            faster, of_limit = found[what, dtype]["ratios"].values()
            cells += [f"{faster:.2f} x faster", f"{of_limit:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cpu_readme(path: Path, document: dict[str, Any]) -> None:
    """Put the table between its marks."""
    before, start, rest = path.read_text(encoding="utf-8").partition(CPU_MARKS[0])
    _, end, after = rest.partition(CPU_MARKS[1])
    path.write_text(before + start + cpu_table(document) + end + after, encoding="utf-8")


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what the samples were taken."""
    from importlib.metadata import PackageNotFoundError, version

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = (
            next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
        )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {"python": platform.python_version(), **{p: found(p) for p in PACKAGES}},
        "fastadapt": fastadapt.__version__,
        "commit": git("rev-parse", "HEAD"),
        "clean": git("status", "--porcelain", "--", "fastadapt", "kernels", "csrc", "bench") == "",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else None


def show(document: dict[str, Any], rival_name: str) -> None:
    """Print the table, each row beside the rival's."""
    from rich.console import Console
    from rich.table import Table

    rows, where = document["contenders"], document["machine"]
    count = document["tokens"][0] * document["tokens"][1]
    rival = rows[rival_name]
    table = Table(
        title=f"{document['shapes']['name']}, {count} tokens, NF4 in {document['compute']}, "
        f"the rest in {document['dtype']}, "
        f"{where['gpu'] or where['cpu']}, {where['threads']} threads"
    )
    table.add_column("", no_wrap=True)
    for column in ("s / step", "IQR", "tokens/s", "PEFT's time / this", "saved, layers (MiB)",
                   "of PEFT's", "saved, step (MiB)", "of PEFT's"):  # fmt: skip
        table.add_column(column, justify="right")
    for name, row in rows.items():
        saved, theirs = row["saved_for_backward_bytes"], rival["saved_for_backward_bytes"]
        shares = [
            cell for part in ("layers", "step")
            for cell in (f"{saved[part] / 2**20:.1f}", f"{saved[part] / theirs[part]:.2f}")
        ]  # fmt: skip
        iqr = row["iqr_seconds"]
        table.add_row(
            name, f"{row['median_seconds']:.3f}", "-" if iqr is None else f"{iqr:.3f}",
            f"{count / row['median_seconds']:.0f}",
            f"{rival['median_seconds'] / row['median_seconds']:.2f}", *shares,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    print(f"parity: losses {document['parity']['loss']}")
    print(f"layers on: {document['implementations']}")
