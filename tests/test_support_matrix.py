# SPDX-License-Identifier: Apache-2.0
"""docs/support-matrix.md is what the library does: every method on every format and kind, tried.

python -m tests.test_support_matrix     writes the file
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest

from fastadapt.errors import UnsupportedError
from fastadapt.methods import METHODS
from fastadapt.testing import (
    FORMATS,
    KINDS,
    METHOD_CASES,
    adapted,
    base_layer,
    config_of,
    exists,
)

FILE = Path(__file__).parents[1] / "docs" / "support-matrix.md"
SHOWN = {"dense32": "fp32", "dense16": "bf16", "bnb4": "NF4", "fp4": "FP4", "bnb8": "int8"}
CELLS = [(f, k) for k in KINDS if k != "linear_nobias" for f in FORMATS if exists(f, k)]
LEAST = 0.9
"""Share of the cells that work, merging included."""


def tried(case: str, fmt: str, kind: str) -> tuple[str, str]:
    """("works", ""), or what cannot be and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            layer = adapted(base_layer(fmt, kind), config_of(case))
        except UnsupportedError as error:
            return "no", str(error)
        try:
            layer.merge()
        except UnsupportedError as error:
            return "no merge", str(error)
    return "works", ""


def leading() -> dict[str, str]:
    """Each method's first case."""
    first = {fields["peft_type"]: case for case, fields in reversed(METHOD_CASES.items())}
    return {t: first[t] for t in sorted(METHODS)}


def matrix() -> tuple[str, float]:
    """The file's text, and the share of cells that work."""
    reasons: dict[str, int] = {}
    count: Counter[str] = Counter()
    heads = [f"{kind.replace('_', ' ')} {SHOWN[fmt]}" for fmt, kind in CELLS]
    rows = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for peft_type, case in leading().items():
        cells = []
        for fmt, kind in CELLS:
            answer, why = tried(case, fmt, kind)
            count[answer] += 1
            note = f" [{reasons.setdefault(why, len(reasons) + 1)}]" if why else ""
            cells.append(answer + note)
        rows.append(f"| {peft_type} | {' | '.join(cells)} |")
    share = count["works"] / count.total()
    text = (
        "# Support matrix\n\n"
        "Written by `python -m tests.test_support_matrix` and held by that test. Each cell was "
        "tried: the adapter was put on and merged; that outputs and gradients are right is what "
        "`tests/test_laws.py` holds. Convolutions and embeddings have no 4-bit or 8-bit form that "
        "a loader makes; such layers are refused with their class in the message. "
        "transformers turns GPT-2's Conv1D into a linear layer when it quantises.\n\n"
        f"{count['works']} of {count.total()} cells work, {share:.1%}.\n\n"
    )
    notes = [f"{i}. {why}" for why, i in reasons.items()]
    return text + "\n".join([*rows, "", *notes]) + "\n", share


def test_the_support_matrix_is_what_the_library_does() -> None:
    pytest.importorskip("bitsandbytes")
    text, share = matrix()
    assert share >= LEAST
    assert FILE.read_text() == text, "run python -m tests.test_support_matrix"


if __name__ == "__main__":
    FILE.write_text(matrix()[0])
