# SPDX-License-Identifier: Apache-2.0
"""docs/methods.md says what bench/results/cpu/methods.json has, and the benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_table_is_made_from_the_results() -> None:
    code = "import sys; sys.path.insert(0, 'bench'); import methods_table as m; print(m.section())"
    assert run("-c", code).removesuffix("\n") in (ROOT / "docs" / "methods.md").read_text()


@pytest.mark.slow
@pytest.mark.parity
def test_a_row_has_times_and_peaks_of_all_three(tmp_path: Path) -> None:
    out = tmp_path / "methods.json"
    run("bench/bench_methods.py", "--quick", "--methods", "hra", "dora", "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {"hra", "dora"}
    for row in rows.values():
        assert set(row) == {"lora", "ours", "peft"}
        assert row["ours"]["trained"] == row["peft"]["trained"]
        assert all(got["ms"] and got["peak_bytes"] > 0 for got in row.values())
