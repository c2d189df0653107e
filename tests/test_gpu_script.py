# SPDX-License-Identifier: Apache-2.0
"""bench/gpu.sh rehearsed on a CPU, so that it does not rot between the machines that have a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tests", "beta", "dequant_gemm", "dequant", "fused", "auto", "row_norm", "layers")
GROUPS = ("beta", "dequant_gemm", "dequant", "auto", "row_norm")


@pytest.mark.slow
@pytest.mark.parity
def test_the_gpu_script_rehearses_its_ops_and_layers(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "--device", "cpu", "--quick", *STAGES],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for group in GROUPS:
        found = json.loads((tmp_path / f"{group}.json").read_text(encoding="utf-8"))
        assert {b["group"] for b in found["benchmarks"]} == {group}
    rows = json.loads((tmp_path / "layers.json").read_text(encoding="utf-8"))["rows"]
    assert {(row["tokens"], row["dropout"]) for row in rows} == {
        (m, p) for m in (3, 16) for p in (0.0, 0.05)
    }
    assert json.loads((tmp_path / "machine.json").read_text(encoding="utf-8"))["commit"]


def test_an_unknown_stage_is_refused() -> None:
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "--nonsense"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "unknown option --nonsense" in done.stderr
