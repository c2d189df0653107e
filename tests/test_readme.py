# SPDX-License-Identifier: Apache-2.0
"""What the documents say is there: examples run, commands, targets and files exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = "<!-- not run in the tests:"


class Example(NamedTuple):
    line: int
    source: str
    run: bool


def examples(text: str) -> list[Example]:
    """The python blocks of a document. One that follows a NOT_RUN comment is only read."""
    found = []
    for match in re.finditer(r"([^\n]*)\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start(2)].count("\n") + 1
        found.append(Example(line, match[2], not match[1].startswith(NOT_RUN)))
    return found


EXAMPLES = examples(README)
CALLS = [
    pytest.param(example.source, id=f"line{example.line}") for example in EXAMPLES if example.run
]


def test_every_block_is_found() -> None:
    assert len(EXAMPLES) == README.count("```python")
    assert len(CALLS) >= 2


@pytest.mark.parametrize("source", CALLS)
def test_example_runs(source: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, check=False,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line{example.line}")
def test_example_uses_names_that_exist(example: Example) -> None:
    """Of fastadapt, for the examples that cannot run here too."""
    import fastadapt

    tree = ast.parse(example.source)
    aliases = {
        name.asname or name.name
        for node in ast.walk(tree) if isinstance(node, ast.Import)
        for name in node.names if name.name == "fastadapt"
    }  # fmt: skip
    used = {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        and node.value.id in aliases
    }  # fmt: skip
    assert used, "an example should use fastadapt"
    assert not [name for name in sorted(used) if not hasattr(fastadapt, name)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    text = document.read_text(encoding="utf-8")
    code = " ".join(re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    assert named <= targets, f"{document.name} names {sorted(named - targets)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    broken = [link for link in links
              if "://" not in link and not (document.parent / link).exists()]  # fmt: skip
    assert not broken


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^fastadapt ([a-z]+)", README, re.M))))
def test_commands_exist(command: str) -> None:
    source = "from fastadapt.cli import main; raise SystemExit(main())"
    done = subprocess.run([sys.executable, "-c", source, command, "--help"], check=False,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_figures_come_from_results() -> None:
    """A speed or a size in the README is a number of a committed result file, rounded."""
    unit = r"x faster|tok/s|tokens/s|ms\b|s/step|GiB|MiB|GB/s|TFLOP"
    figures = re.findall(rf"(\d+(?:\.\d+)?)\s*(?:{unit})", README)
    files = sorted((ROOT / "bench" / "results").glob("**/*.json"))
    results = "".join(path.read_text(encoding="utf-8") for path in files)
    numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", results)]
    for figure in figures:
        decimals = len(figure.partition(".")[2])
        assert any(f"{n:.{decimals}f}" == figure for n in numbers), figure


def test_figures_are_those_of_the_result() -> None:
    spec = importlib.util.spec_from_file_location("bench_report", ROOT / "bench" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    result = json.loads((ROOT / "bench/results/cpu/native.json").read_text(encoding="utf-8"))
    start, end = report.CPU_MARKS
    assert README.partition(start)[2].partition(end)[0] == report.cpu_table(result)
