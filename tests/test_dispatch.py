# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: automatic choice, forcing, reasons; nothing falls back silently."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.errors import ConfigError, KernelError
from fastadapt.ops import dispatch, native
from fastadapt.ops.bits import Dense, flatten
from fastadapt.ops.dispatch import IMPLEMENTATIONS, OPS, Op, forced, use
from fastadapt.ops.dropout import dropout, dropout_fwd
from fastadapt.ops.low_rank import low_rank_bwd, low_rank_fwd
from fastadapt.ops.nf4 import nf4_dequant
from fastadapt.ops.row_norm import row_norm
from fastadapt.testing import LowRankCase

X, SEED = torch.ones(4, 8), torch.tensor([1])
MODULE = '''
"""An implementation that doubles, and counts how often it was imported."""
import builtins
builtins.imported_doubles = getattr(builtins, "imported_doubles", 0) + 1
def double(x):
    return x * 2
def why_not_double(x):
    return "x has more than 10 elements" if x.numel() > 10 else None
def broken(x):
    raise ValueError("broken inside")
'''


@pytest.fixture
def op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> Iterator[Op]:
    """y = x + x by the reference, x * 2 by "native", which refuses more than 10 elements."""
    (tmp_path / "fastadapt_doubles.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "test_" + request.node.originalname.removeprefix("test_")[:40]
    made = Op(
        name, "(Tensor x) -> Tensor", lambda x: x + x, native="fastadapt_doubles:double",
        triton="fastadapt_is_not_there:double",
    )  # fmt: skip
    yield made
    del OPS[name]
    sys.modules.pop("fastadapt_doubles", None)


@pytest.fixture(autouse=True)
def _automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTADAPT_IMPL", raising=False)


# choosing


def test_the_first_that_can_serve_does(op: Op) -> None:
    assert op.choose(torch.ones(4)) == "native"
    assert op.choose(torch.ones(11)) == "reference"
    assert torch.equal(op(torch.ones(4)), torch.full((4,), 2.0))
    assert torch.equal(op(torch.ones(11)), torch.full((11,), 2.0))


def test_implementations_are_in_the_order_of_preference(op: Op) -> None:
    assert op.implementations == IMPLEMENTATIONS == ("triton", "native", "reference")
    for every in OPS.values():
        assert every.implementations[-1] == "reference"


def test_why_not_says_who_and_why(op: Op) -> None:
    assert op.why_not("reference", torch.ones(4)) is None
    assert op.why_not("native", torch.ones(4)) is None
    assert op.why_not("native", torch.ones(11)) == "native: x has more than 10 elements"
    reason = op.why_not("triton", torch.ones(4))
    assert reason is not None
    assert reason.startswith("triton: fastadapt_is_not_there cannot be imported (")


def test_an_op_without_an_implementation_says_so() -> None:
    made = Op("test_reference_alone", "(Tensor x) -> Tensor", torch.clone)
    try:
        assert made.implementations == ("reference",)
        assert made.choose(X) == "reference"
        reason = "native: no implementation of test_reference_alone"
        assert made.why_not("native", X) == reason
        with use("native"), pytest.raises(KernelError, match=reason):
            made(X)
    finally:
        del OPS["test_reference_alone"]


def test_modules_are_imported_once_and_so_is_a_failure(
    op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    builtins.imported_doubles = 0  # type: ignore[attr-defined]
    tried: list[str] = []
    real = dispatch.import_module

    def counted(name: str) -> Any:
        tried.append(name)
        return real(name)

    monkeypatch.setattr(dispatch, "import_module", counted)
    for _ in range(3):
        op(torch.ones(4))
    assert tried == ["fastadapt_is_not_there", "fastadapt_doubles"]
    assert builtins.imported_doubles == 1  # type: ignore[attr-defined]


def test_an_error_inside_an_implementation_is_not_hidden() -> None:
    made = Op(
        "test_broken", "(Tensor x) -> Tensor", torch.clone, native="fastadapt.ops.native:dropout"
    )
    try:
        with pytest.raises(TypeError):
            made(X)
    finally:
        del OPS["test_broken"]


def test_an_unknown_implementation_of_an_op() -> None:
    with pytest.raises(ConfigError, match="op wrong: unknown implementations \\['cuda'\\]"):
        Op("wrong", "(Tensor x) -> Tensor", torch.clone, cuda="module:function")
    assert "wrong" not in OPS


# forcing


def test_use_forces_and_ends(op: Op) -> None:
    assert forced() is None
    with use("reference"):
        assert forced() == op.choose(torch.ones(4)) == "reference"
        with use("native"):
            assert forced() == op.choose(torch.ones(4)) == "native"
        with use("auto"):
            assert forced() is None
        assert forced() == "reference"
    assert forced() is None


def test_use_ends_with_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), use("reference"):
        raise ZeroDivisionError
    assert forced() is None


def test_forced_runs_or_raises_with_the_reason(op: Op) -> None:
    with use("native"):
        assert torch.equal(op(torch.ones(4)), torch.full((4,), 2.0))
        message = "'native' was forced and cannot run: native: x has more than 10 elements"
        with pytest.raises(KernelError, match=message):
            op(torch.ones(11))
    with use("triton"), pytest.raises(KernelError, match="fastadapt_is_not_there cannot be"):
        op(torch.ones(4))


def test_the_environment_forces_and_use_has_the_last_word(
    op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("reference", "native"):
        monkeypatch.setenv("FASTADAPT_IMPL", name)
        assert op.choose(torch.ones(4)) == name
    monkeypatch.setenv("FASTADAPT_IMPL", "native")
    with pytest.raises(KernelError, match="forced"):
        op(torch.ones(11))
    with use("reference"):
        assert op.choose(torch.ones(11)) == "reference"
    with use("auto"):
        assert op.choose(torch.ones(11)) == "reference"
    monkeypatch.setenv("FASTADAPT_IMPL", "auto")
    assert forced() is None


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"implementation must be auto or one of .* got 'cuda'"):
        use("cuda").__enter__()
    monkeypatch.setenv("FASTADAPT_IMPL", "fast")
    with pytest.raises(ConfigError, match=r"FASTADAPT_IMPL must be auto or one of .* got 'fast'"):
        dropout(X, 0.5)


# the library's own ops


def test_reasons_of_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    far = torch.empty(4, 8, device="meta")
    assert dropout_fwd.why_not("native", far, SEED, 0.5, far.dtype) == "native: x is not on a CPU"
    t = LowRankCase().make()
    args = (t.x, None, t.a, t.b, 1.0, 0.0, None, t.x.dtype, t.x.dtype, *flatten(t.bits))
    away = (t.x.to("meta"), *args[1:])
    assert low_rank_fwd.why_not("native", *away) == "native: x is not on a CPU"
    back = (t.g.to("meta"), t.x, t.a[:, :8], t.a, t.b, 1.0, 0.0, None, t.x.dtype, True, True, True)
    assert low_rank_bwd.why_not("native", *back, *flatten(t.bits)) == "native: x is not on a CPU"
    wide = (t.a, t.b, 1.0, *flatten(Dense(torch.ones(48, 64, dtype=torch.float64))))
    assert OPS["row_norm"].why_not("native", *wide) == "native: W is float64"
    monkeypatch.setattr(native, "why_not", lambda: "fastadapt._C is not built; build it")
    for op, call in ((low_rank_fwd, args), (dropout_fwd, (X, SEED, 0.5, X.dtype))):
        assert op.why_not("native", *call) == "native: fastadapt._C is not built; build it"
        assert op.choose(*call) == "reference"


@pytest.mark.native
@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_native_is_chosen_on_a_cpu() -> None:
    t = LowRankCase(bits="nf4").make()
    args = (t.x, None, t.a, t.b, 1.0, 0.0, None, t.x.dtype, t.x.dtype, *flatten(t.bits))
    assert low_rank_fwd.choose(*args) == "native"
    assert dropout_fwd.choose(X, SEED, 0.5, X.dtype) == "native"
    assert OPS["row_norm"].choose(t.a, t.b, 1.0, *flatten(t.bits)) == "native"
    assert OPS["nf4_dequant"].choose(*t.bits, torch.bfloat16) == "native"


@pytest.mark.native
@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_float64_is_served_whoever_can() -> None:
    """The native decoder has no float64: automatic choice serves it, a forced one says why not."""
    t = LowRankCase(bits="nf4").make()
    assert t.bits is not None
    wanted: list[tuple[Any, Any]] = [
        (lambda: nf4_dequant(t.bits, torch.float64), "float64 values"),
        (lambda: row_norm(Dense(t.w.double()), t.a, t.b, 1.0), "W is float64"),
    ]
    for call, reason in wanted:
        result: Tensor = call()
        assert result.dtype == torch.float64
        with use("native"), pytest.raises(KernelError, match=reason):
            call()
