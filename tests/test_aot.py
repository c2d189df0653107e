# SPDX-License-Identifier: Apache-2.0
"""The kernels compiled for GPUs that are not there keep their laws, and the committed table is what
they compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results" / "aot"
ARCHS = {80, 86, 90, 100}


def compiled(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """In a process of its own: TRITON_INTERPRET and the cache folder are read at import."""
    done = subprocess.run(
        [sys.executable, "bench/aot.py", "--out", str(out), *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 laws broken" in done.stdout, done.stderr
    return list(json.loads(out.read_text(encoding="utf-8"))["rows"])


def committed() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "table.json").read_text(encoding="utf-8")))


def name(row: dict[str, Any]) -> str:
    return f"{row['kernel']} {row['variant']} {row['dtype']} sm_{row['arch']}"


def assert_as_committed(rows: list[dict[str, Any]]) -> None:
    """Figures are compared where the compiler is the table's; the laws hold with any."""
    table = committed()
    known = {name(row): row for row in table["rows"]}
    for row in rows:
        assert name(row) in known, f"{name(row)} is new: run python bench/aot.py"
        if triton.__version__ == table["triton"]:
            assert row == known[name(row)], f"{name(row)} has changed: run python bench/aot.py"


def test_a_part_of_every_kernel_compiles_to_what_the_table_says(tmp_path: Path) -> None:
    rows = compiled(tmp_path / "table.json", "--quick")
    seen: dict[str, set[int]] = {}
    for row in rows:
        seen.setdefault(row["kernel"], set()).add(row["arch"])
    assert set(seen) == {row["kernel"] for row in committed()["rows"]}
    assert all(archs == ARCHS for archs in seen.values()), seen
    assert_as_committed(rows)


@pytest.mark.slow
def test_every_variant_compiles_to_what_the_table_says(tmp_path: Path) -> None:
    rows = compiled(tmp_path / "table.json", "--jobs", "2")
    assert_as_committed(rows)
    assert {name(row) for row in rows} == {name(row) for row in committed()["rows"]}


def test_every_kernel_is_in_the_table() -> None:
    """A kernel that nobody listed in builds.py is compiled by nobody."""
    written = set()
    for path in sorted((ROOT / "kernels" / "fused").glob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("def ") and "_kernel(" in line:
                written.add(line.removeprefix("def ").partition("(")[0])
    assert written == {row["kernel"] for row in committed()["rows"]}


def test_the_page_is_made_from_the_table() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    rendered = subprocess.run(
        [sys.executable, "-c", "import json, sys; sys.path.insert(0, 'bench'); import aot; "
         "print(aot.page(json.loads(aot.TABLE.read_text())), end='')"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert text == rendered
