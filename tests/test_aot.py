# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiled ahead of time, no GPU needed: what came out keeps the laws of
bench/aot.py, and is no worse than the committed table where the compiler is the same."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "aot.py"


@pytest.fixture(scope="module")
def aot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastadapt_bench_aot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed(aot: ModuleType) -> dict[str, Any]:
    return json.loads(aot.TABLE.read_text(encoding="utf-8"))


def compiled(folder: Path, *options: str) -> dict[str, Any]:
    """A fresh table, from a process in which no kernel was decorated for the interpreter."""
    out = folder / "table.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--out", str(out)], cwd=ROOT, text=True,
        capture_output=True, check=False, env=os.environ | {"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return table


def worse(aot: ModuleType, fresh: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Broken laws; and, where the compiler is that of the table, what grew or is not in it."""
    found = [f"{aot.key(row)}: {law}" for row in fresh["rows"] for law in aot.laws(row)]
    if fresh["triton"] != committed["triton"]:
        return found
    known = {aot.key(row): row for row in committed["rows"]}
    for row in fresh["rows"]:
        was = known.get(aot.key(row))
        if was is None:
            found.append(f"{aot.key(row)}: not in the committed table")
            continue
        for what in ("registers", "shared", "per_element"):
            if (row[what] or 0) > (was[what] or 0):
                found.append(f"{aot.key(row)}: {what} {row[what]}, {was[what]} in the table")
        if row["fixed"] != was["fixed"]:
            found.append(f"{aot.key(row)}: compiled with {row['fixed']}, {was['fixed']} then")
    return found


AGAIN = "; if this is meant, run python bench/aot.py and commit what it writes"


def test_the_kernels_keep_the_laws_on_sm_90(
    aot: ModuleType, committed: dict[str, Any], tmp_path: Path
) -> None:
    found = worse(aot, compiled(tmp_path, "--quick"), committed)
    assert not found, "\n".join(found) + AGAIN


@pytest.mark.slow
def test_all_variants_keep_the_laws_everywhere(
    aot: ModuleType, committed: dict[str, Any], tmp_path: Path
) -> None:
    fresh = compiled(tmp_path)
    found = worse(aot, fresh, committed)
    assert not found, "\n".join(found) + AGAIN
    gone = {aot.key(r) for r in committed["rows"]} - {aot.key(r) for r in fresh["rows"]}
    assert not gone, f"in the table and nowhere else: {sorted(gone)}{AGAIN}"


def test_the_committed_table_keeps_the_laws_and_is_whole(
    aot: ModuleType, committed: dict[str, Any]
) -> None:
    assert not [aot.key(row) for row in committed["rows"] if aot.laws(row)]
    wanted = sum(1 for _ in aot.jobs(list(aot.SHARED_LIMIT), quick=False))
    assert len({aot.key(row) for row in committed["rows"]}) == len(committed["rows"]) == wanted
    assert {row["arch"] for row in committed["rows"]} == {80, 86, 90, 100}


def test_the_page_is_that_of_the_table(aot: ModuleType, committed: dict[str, Any]) -> None:
    assert aot.PAGE.read_text(encoding="utf-8") == aot.page(committed)


def test_every_kernel_is_compiled(aot: ModuleType) -> None:
    """Each ``*_kernel`` of kernels/fused has a row: a new kernel cannot be forgotten."""
    folder = ROOT / "kernels" / "fused"
    written = {
        line.removeprefix("def ").partition("(")[0]
        for path in folder.glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("def ") and line.partition("(")[0].endswith("_kernel")
    }
    assert written == {row.kernel.__name__ for row in aot.ROWS}


BROKEN = {
    "spills": 1, "stack": 8, "tensor_core": {}, "shared": 1 << 20, "per_element": 9.3,
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_law_that_is_broken_is_found(
    aot: ModuleType, committed: dict[str, Any], what: str
) -> None:
    row = next(r for r in committed["rows"] if r["decodes"] and r["dots"] and r["arch"] == 90)
    assert not aot.laws(row)
    assert aot.laws(row | {what: BROKEN[what]})


def test_what_grew_is_found(aot: ModuleType, committed: dict[str, Any]) -> None:
    row = committed["rows"][0]
    fresh = {"triton": committed["triton"], "rows": [row | {"registers": row["registers"] + 1}]}
    assert len(worse(aot, fresh, committed)) == 1
    assert not worse(aot, fresh | {"triton": "0.0.0"}, committed)
