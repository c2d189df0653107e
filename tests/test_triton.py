# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel through its op, under the interpreter: the cases of triton_cases.py, all in
one process of their own, because TRITON_INTERPRET must not reach the other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastadapt.errors import ConfigError, KernelError
from fastadapt.ops import dispatch
from fastadapt.ops.dispatch import OPS, triton_state
from tests.triton_cases import CASES, SPREAD

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent


def _marked(name: str) -> object:
    marks = [pytest.mark.interpret] + [pytest.mark.slow] * (name not in SPREAD)
    return pytest.param(name, id=name, marks=marks)


@pytest.fixture(scope="module")
def wrong(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """id -> traceback or None, of the cases that this run selected."""
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "originalname", "") == test_in_the_interpreter.__name__
    ]
    script = "import sys; from tests.triton_cases import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, *wanted], cwd=ROOT, capture_output=True, text=True,
        check=False, env=os.environ | {"TRITON_INTERPRET": "1", "FASTADAPT_IMPL": "auto"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", [_marked(name) for name in CASES])
def test_in_the_interpreter(name: str, wrong: dict[str, str | None]) -> None:
    assert wrong[name] is None, wrong[name]


def test_every_kernel_of_every_op_is_among_the_default_cases() -> None:
    """A guard against a subset that has lost an op: each that Triton serves is asked for."""
    prefix = {"nf4_dequant": "decode", "low_rank_fwd": "low_rank", "low_rank_bwd": "low_rank"}
    prefix |= dict.fromkeys(("low_rank_mixed_fwd", "low_rank_mixed_bwd"), "low_rank_mixed")
    prefix |= dict.fromkeys(("rotate_fwd", "rotate_bwd"), "rotate")
    prefix |= dict.fromkeys(("reflect_fwd", "reflect_bwd"), "reflect")
    prefix |= dict.fromkeys(("low_rank_group_fwd", "low_rank_group_bwd"), "low_rank_group")
    served = [name for name, op in OPS.items() if "triton" in op.implementations]
    assert served
    for name in served:
        assert any(case.startswith(f"{prefix.get(name, name)}-") for case in SPREAD), name


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = torch.zeros(8), torch.tensor([1]), 0.5, torch.float32
    reason = OPS["dropout"].why_not("triton", *args)
    assert reason == "triton: the tensors are on a cpu, Triton needs a GPU"


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.kernels import launch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launch.triton, "__version__", "3.4.1")
    assert launch.why_not_here(torch.device("cuda")) == "triton 3.4.1 is older than 3.5"
    assert "older than 3.5: not used" in triton_state()
    monkeypatch.setattr(launch.triton, "__version__", "3.10.0")
    assert launch.why_not_here(torch.device("cuda")) is None
    assert triton_state() == "3.10.0 is newer than 3.9, the newest that was tested"
    monkeypatch.setattr(launch.triton, "__version__", "3.6.0")
    assert triton_state() == "3.6.0, tested"


def test_a_broken_triton_is_said_and_the_others_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may fail with anything while it is imported."""

    def broken(name: str) -> object:
        raise AttributeError("module 'triton' has no attribute 'jit'")

    monkeypatch.setattr(dispatch, "import_module", broken)
    reason = "AttributeError: module 'triton' has no attribute 'jit'"
    assert triton_state() == f"no Triton kernel can run ({reason})"
    dropout = OPS["dropout"]
    monkeypatch.setattr(dropout, "_loaded", {})
    args = torch.zeros(8), torch.tensor([1]), 0.5, torch.float32
    assert reason in str(dropout.why_not("triton", *args))
    assert dropout.choose(*args) == "reference"


@pytest.mark.parametrize(
    ("capability", "most"),
    [((7, 5), 0), ((8, 0), 128), ((8, 6), 128), ((8, 7), 128), ((8, 9), 256), ((9, 0), 256),
     ((10, 0), 32), ((10, 3), 32), ((12, 0), 256)],
)  # fmt: skip
def test_the_fused_product_is_chosen_by_gpu_family(
    capability: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastadapt.kernels import policy

    monkeypatch.delenv("FASTADAPT_NF4_PRODUCT", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    half, gpu = torch.bfloat16, torch.device("cuda")
    for m in (0, 1, most, most + 1):
        assert policy.fused(m, 4096, 64, half, half, gpu) == (0 < m <= most)


def test_a_forced_product_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.kernels import policy

    half, cpu = torch.bfloat16, torch.device("cpu")
    monkeypatch.setenv("FASTADAPT_NF4_PRODUCT", "decoded")
    assert not policy.fused(1, 4096, 64, half, half, cpu)
    monkeypatch.setenv("FASTADAPT_NF4_PRODUCT", "fused")
    assert policy.fused(8192, 4096, 64, half, half, cpu)
    for sizes, reason in (
        ((4, 72, 64, half, half), "multiples of 64"),
        ((4, 64, 32, half, half), "multiples of 64"),
        ((4, 64, 64, half, torch.float64), "the product is torch.float64"),
        ((4, 64, 64, half, torch.float16), "rounded twice"),
    ):
        with pytest.raises(KernelError, match=reason):
            policy.fused(*sizes, cpu)
    monkeypatch.setenv("FASTADAPT_NF4_PRODUCT", "fast")
    with pytest.raises(ConfigError, match="auto, fused or decoded"):
        policy.fused(4, 64, 64, half, half, cpu)
