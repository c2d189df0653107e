# SPDX-License-Identifier: Apache-2.0
"""No test types a tolerance above 2e-2: a larger one hides an error, and a computed budget says
what it is made of."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LARGEST = 2e-2
KEYWORDS = {"rtol", "atol", "tol", "rel", "abs", "tolerance", "rel_tol", "abs_tol"}
DIFFERENCES = {"abs", "norm", "max", "dist", "worst_error", "error"}


def typed(tree: ast.AST) -> Iterator[tuple[int, float]]:
    """(line, value) of each number that is a tolerance: a keyword or a name that says so, the
    positional ones of allclose, or the right side of ``abs(a - b) < number``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, v) for k in node.keywords if k.arg in KEYWORDS
                        for v in numbers(k.value))  # fmt: skip
            if called(node) in ("allclose", "isclose"):
                yield from ((node.lineno, v) for a in node.args[2:] for v in numbers(a))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
            if any(name.lower() in KEYWORDS for name in names):
                yield from ((node.lineno, v) for v in numbers(node.value))
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt | ast.LtE):
            inside = [n for n in ast.walk(node.left) if isinstance(n, ast.Call)]
            subtracts = any(isinstance(n, ast.Sub) for n in ast.walk(node.left))
            if subtracts and any(called(n) in DIFFERENCES for n in inside):
                yield from ((node.lineno, v) for v in numbers(node.comparators[0]))


def numbers(node: ast.AST) -> Iterator[float]:
    """A literal, or those of a conditional expression; a computed value has none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield float(node.value)
    elif isinstance(node, ast.IfExp):
        yield from numbers(node.body)
        yield from numbers(node.orelse)
    elif isinstance(node, ast.Tuple | ast.List):
        for element in node.elts:
            yield from numbers(element)


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def test_no_typed_tolerance_is_above_2e_2() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{line}: {value}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, value in typed(ast.parse(path.read_text(encoding="utf-8")))
        if value > LARGEST and path != Path(__file__)
    ]
    assert not found, "\n".join(found)


def test_the_scan_finds_what_it_looks_for() -> None:
    """A guard of the scan: each form is found, and a computed budget is not."""
    forms = (
        "assert_close(a, b, rtol=0.1, atol=0.1)", "torch.allclose(a, b, 0.1)", "TOL = 0.1",
        "assert (a - b).abs().max() < 0.1", "approx(x, abs=0.1 if half else 1e-6)",
    )  # fmt: skip
    for form in forms:
        assert max(v for _, v in typed(ast.parse(form))) > LARGEST, form
    assert not list(typed(ast.parse("assert (a - b).norm() <= 2 * plain")))
