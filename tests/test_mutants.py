# SPDX-License-Identifier: Apache-2.0
"""The suite sees every seeded bug of mutants.py. One that survives is a test that is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import ALL

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.parity
def test_the_suite_kills_every_mutant() -> None:
    """Both kinds at once, a process each."""
    running = {}
    for kind in ALL:
        env = {
            k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTADAPT_IMPL")
        }
        if kind == "kernels":
            env["TRITON_INTERPRET"] = "1"
        running[kind] = subprocess.Popen(
            [sys.executable, "tests/mutants.py", kind], cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    for kind, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        killed = json.loads(out)
        assert not killed.pop("sound"), f"{kind}: a test fails without any change"
        assert set(killed) == {mutant.name for mutant in ALL[kind]}
        assert not [name for name, dead in killed.items() if not dead]


def test_there_are_enough_mutants_and_no_two_are_alike() -> None:
    mutants = [mutant for kind in ALL.values() for mutant in kind]
    assert len(mutants) >= 30
    assert len({mutant.name for mutant in mutants}) == len(mutants)
    assert len({mutant[1:4] + mutant[5:] for mutant in mutants}) == len(mutants)


def test_every_mutant_still_changes_something() -> None:
    """The source moves on: what a mutant replaces must be there."""
    for mutant in (mutant for kind in ALL.values() for mutant in kind):
        text = (ROOT / mutant.path).read_text(encoding="utf-8")
        assert text.count(mutant.old) > mutant.nth, f"{mutant.name}: not in {mutant.path}"
        assert mutant.old != mutant.new
