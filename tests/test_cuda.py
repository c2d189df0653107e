# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources compile where nvcc is, for the oldest and the newest family that they are for;
what they compute, only a GPU can tell."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("80", "90a")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_source_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["nvcc", "-c", "-O3", "-std=c++20", "-DUSE_CUDA",
         "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas", "-v", "-Xcompiler", "-fPIC",
         *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS),
         f"-I{Path(torch.__file__).parent / 'include'}", str(source), "-o", str(tmp_path / "x.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = re.findall(r"entry function '(\w+)' for 'sm_(\w+)'", done.stderr)
    assert {arch for _, arch in kernels} == set(ARCHS)
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spilled) == len(kernels)
    assert set(spilled) == {("0", "0")}


def test_there_are_sources() -> None:
    assert [path.name for path in SOURCES] == ["nf4.cu"]
