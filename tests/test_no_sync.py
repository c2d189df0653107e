# SPDX-License-Identifier: Apache-2.0
"""A CUDA graph can capture every op: nothing on its path waits for the GPU, reads a value back to
the host, or copies from pageable memory."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.ops import dispatch
from tests.op_arguments import op_arguments

ROOT = Path(__file__).resolve().parent.parent
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "is_nonzero", "argwhere"}
"""Methods that wait for a GPU, or whose result has a size that only the GPU knows."""
SOURCES = [*sorted((ROOT / "fastadapt" / "ops").glob("*.py")),
           *sorted((ROOT / "kernels" / "fused").glob("*.py"))]  # fmt: skip


class Refused(Exception):
    pass


class NoSync(TorchDispatchMode):
    """Raises at an operation that a CUDA graph could not capture."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in {"_local_scalar_dense", "nonzero", "equal", "unique", "masked_select"}:
            raise Refused(f"{func.name()} waits for the GPU")
        before = {t.device.type for t in _tensors(args)}
        result = func(*args, **(kwargs or {}))
        after = {t.device.type for t in _tensors((result,))}
        if name in {"_to_copy", "copy_", "copy"} and len(before | after) > 1:
            raise Refused(f"{func.name()} copies between devices")
        return result


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, calls in op_arguments().items() for i in range(len(calls))]
)
def test_the_reference_waits_for_nothing(name: str, index: int) -> None:
    """On a device without values, which stands in for a GPU."""
    args = [_away(v) for v in op_arguments()[name][index]]
    with NoSync():
        result = dispatch.OPS[name].reference(*args)
    assert {t.device.type for t in _tensors((result,))} <= {"meta"}


def test_the_guard_refuses_what_waits() -> None:
    x = torch.ones(3)
    with NoSync():
        for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.equal(x, x)):
            with pytest.raises(Refused, match="waits"):
                wait()
    with NoSync(), pytest.raises(Refused, match="copies"):
        torch.ones(3).to("meta")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_no_source_of_an_op_names_a_wait(path: Path) -> None:
    """But for functions ``*_native``, which only ever serve tensors on a CPU."""
    tree = ast.parse(path.read_text("utf-8"))
    tree.body = [node for node in tree.body if not getattr(node, "name", "").endswith("_native")]
    calls = (node for node in ast.walk(tree)
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))  # fmt: skip
    found = [f"{path.name}:{n.lineno} .{n.func.attr}()" for n in calls if n.func.attr in WAITS]
    assert found == []


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _away(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [_away(v) for v in value]
    return value
