# SPDX-License-Identifier: Apache-2.0
"""Seeded bugs: one small change of the source each, and the narrowest tests that must see it.

``python mutants.py KIND`` applies each of that kind to a copy of the package, in a forked process
that then imports the copy, and writes {name: whether a test failed} to stdout. "sound", without a
change, must pass all of those tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60
"""A mutant that hangs is seen too."""


class Mutant(NamedTuple):
    """In ``path`` the ``nth`` occurrence of ``old`` becomes ``new``. killers: ids of
    triton_cases.CASES for a kernel, else arguments of pytest."""

    name: str
    path: str
    old: str
    new: str
    killers: tuple[str, ...]
    nth: int = 0


def _low(**changes: object) -> str:
    """The id of a case of low_rank; the defaults are those of LowRankCase."""
    shown = [changes.pop("bits", "dense"), changes.pop("dtype", "float32")]
    return "low_rank-" + "-".join(map(str, [*shown, *(f"{k}{v}" for k, v in changes.items())]))


_NF4, _GEMM, _LOW, _NORM = (f"kernels/fused/{n}.py" for n in
                            ("nf4", "nf4_gemm", "low_rank", "row_norm"))  # fmt: skip
_TURN, _REFLECT, _MIXED = (f"kernels/fused/{n}.py" for n in
                            ("rotate", "reflect", "low_rank_mixed"))  # fmt: skip
_ADAPTERS = "low_rank_mixed-none-fp32-p0.3"
_MASKED = _low(dtype="float16", k=128, r=256, p=0.3)
_TALL = "decode-130x64-nf4-nested-64-fp32"

KERNELS = (
    Mutant("nibbles in the wrong order", _NF4, "tl.interleave(byte >> 4, byte) & 15",
           "tl.interleave(byte, byte >> 4) & 15", ("decode-3x5-nf4-64-fp32",)),
    Mutant("a nested absmax without its offset", _NF4, "* coarse + tl.load(offset)", "* coarse",
           (_TALL,)),
    Mutant("always the first nested absmax", _NF4, "block.to(tl.uint32) // NESTED_BLOCK",
           "block * 0", ("decode-two_levels",)),
    Mutant("the neighbour's absmax", _NF4, "scale_of(first + rows, rows",
           "scale_of(first + rows // 2, rows", ("decode-5x192-nf4-64-fp32",)),
    Mutant("a decoded value without its scale", _NF4, "decode(byte, table) * scale[:, None]",
           "decode(byte, table)", ("decode-3x5-nf4-64-fp32",)),
    Mutant("values that are not rounded", _NF4, ".to(ROUND).to(out.dtype", ".to(out.dtype",
           ("decode-130x64-nf4-64-fp16",)),
    Mutant("the second program starts a block late", _NF4, "part.to(tl.int64) * BLOCKS",
           "part.to(tl.int64) * (BLOCKS + 1)", (_TALL, "decode-130x64-nf4-64-fp16")),
    Mutant("a group's third weight where the second begins", _NF4, "part -= first_2",
           "part -= first_1", ("decode-group_of_3",)),
    Mutant("the pair table the wrong way round", _NF4, "(even & 0xFFFF) | (odd << 16)",
           "(odd & 0xFFFF) | (even << 16)", ("decode-pairs",)),
    Mutant("the pair table's byte keeps its sign", _NF4, "byte = _bytes(packed) & 255",
           "byte = _bytes(packed) & 127", ("decode-pairs_back",)),
    Mutant("the fused product forgets earlier columns", _GEMM, "acc = tl.dot(w, xt, acc,",
           "acc = tl.dot(w, xt,", ("split-gemm", _low(bits="nf4", m=16, k=128, n=64))),
    Mutant("the fused backward product forgets earlier rows", _GEMM, "acc = tl.dot(tile, w, acc,",
           "acc = tl.dot(tile, w,", ("split-gemm_back", _low(bits="nf4", k=192, n=130))),
    Mutant("rows past the end of W count", _GEMM, "mask=(within < n - row)[None, :]",
           "mask=(within < n - row + 64)[None, :]", (_low(bits="nf4"),)),
    Mutant("a flipped product that forgets earlier rows", _GEMM,
           "tl.dot(tl.trans(w), tl.trans(tile), acc,", "tl.dot(tl.trans(w), tl.trans(tile),",
           (_low(bits="nf4", dtype="float16", m=16, k=512, n=256),)),
    Mutant("every part starts at the first column", _GEMM, "first = split * depth * DEPTH",
           "first = split * 0", ("split-gemm",)),
    Mutant("only the first part is summed", _GEMM, "parts.sum(0) + y", "parts[0] + y",
           ("split-gemm",)),
    Mutant("the product replaces the low-rank part", _GEMM, "(parts.sum(0) + y)", "parts.sum(0)",
           (_low(bits="nf4"),)),
    Mutant("tokens in each other's place", _GEMM, "(split.to(tl.int64) * m + tokens)[None, :] * n",
           "(split.to(tl.int64) * m + (tokens + 1) % m)[None, :] * n", (_low(bits="nf4"),)),
    Mutant("the lanes of a mask swapped", "kernels/fused/philox.py", "tl.join(low, high)",
           "tl.join(high, low)", ("dropout-4099-p0.5-fp32",)),
    Mutant("a mask that forgets its column", "kernels/fused/philox.py", "[:, None] * k + column)",
           "[:, None] * k + column * 0)", (_MASKED,)),
    Mutant("dropout without its scale", "kernels/fused/dropout.py", "tl.where(keep, scale, 0.0)",
           "tl.where(keep, 1.0, 0.0)", ("dropout-4099-p0.5-fp32",)),
    Mutant("u forgets earlier columns", _LOW, "acc = tl.dot(tile, tl.trans(w), acc,",
           "acc = tl.dot(tile, tl.trans(w),", (_low(k=192, n=130), "split-wide")),
    Mutant("dB forgets earlier rows", _LOW, "db = tl.dot(tl.trans(tile), hidden, db,",
           "db = tl.dot(tl.trans(tile), hidden,", ("split-tall", _low(m=65, p=0.3))),
    Mutant("dA without dropout", _LOW,
           "tile = _dropped(tile, key, rows, column, k, threshold, scale, DROP, ROWS, COLUMNS)",
           "tile = tile", (_low(p=0.3),), nth=1),
    Mutant("dB without its scale", _LOW, ".mul_(scale).to(b.dtype)", ".to(b.dtype)", (_low(),)),
    Mutant("du without its scale", _LOW, "w = (b * scale).to(g.dtype)", "w = b.to(g.dtype)",
           (_low(),)),
    Mutant("dx without its mask", _LOW, "value = value * tl.where(keep, scale, 0.0)",
           "value = value * scale", (_low(p=0.3),)),
    Mutant("only the last part is summed", _LOW, "else parts.sum(0)", "else parts[-1]",
           ("split-wide",)),
    Mutant("half of the cross term of a norm", _NORM, "2 * scale * left * u", "scale * left * u",
           ("row_norm-65x192-r8-dense-fp32",)),
    Mutant("the norm of the last columns", _NORM, "square += tl.sum", "square = tl.sum",
           ("row_norm-65x192-r8-dense-fp32",)),
    Mutant("an unaligned row's absmax", _NORM, "scale_of(2 * i // QBLOCK", "scale_of(i // QBLOCK",
           ("row_norm-16x200-r8-flat-fp32",)),
    Mutant("a norm of W for every chunk of ranks", _NORM, "tl.where(chunk == 0, square, 0.0)",
           "square", ("row_norm-17x192-r384-nested-fp32",)),
    Mutant("a sum that cancels", _NORM, "if tl.max(cancels.to(tl.int32), 0) > 0:",
           "if tl.max(cancels.to(tl.int32), 0) > 1:", ("row_norm-cancels-dense-0.0",)),
    Mutant("a gradient through the rotation itself", _TURN,
           "column[None, :] * SIZE + row[:, None]", "row[:, None] * SIZE + column[None, :]",
           ("rotate-17x192-6x32-apart1-fp32",)),
    Mutant("blocks that mix", _TURN, "same = left[:, None] == right[None, :]",
           "same = left[:, None] >= 0", ("rotate-7x96-24x4-apart2-fp32",)),
    Mutant("a butterfly that stays where it is", _TURN, "if APART > 1:", "if APART > 99:",
           ("rotate-7x96-24x4-apart2-fp32",)),
    Mutant("the first block for all", _TURN, "(left % count)", "(left % 1)",
           ("rotate-5x21-3x7-apart1-fp32",)),
    Mutant("dD forgets earlier rows", _TURN, "dd = tl.dot(tl.trans(left), grad, dd,",
           "dd = tl.dot(tl.trans(left), grad,", ("rotate-130x64-64x1-apart1-fp32",)),
    Mutant("a cut block without its other tiles", _TURN,
           "turned = tl.dot(part, block.to(kind), turned,",
           "turned = tl.dot(part, block.to(kind),", ("rotate-3x132-2x66-apart1-fp32",)),
    Mutant("a reflection without x", _REFLECT, "value += own", "value += 0 * own",
           ("reflect-17x63-r5-fp32",)),
    Mutant("a reflection in the last ranks", _REFLECT, "value = tl.dot(left, right, value,",
           "value = tl.dot(left, right,", ("reflect-33x96-r64-fp32",)),
    Mutant("the ranks of the first adapter for all", _MIXED, "a = tl.load(w + (start + ranks)",
           "a = tl.load(w + ranks", (_ADAPTERS,)),
    Mutant("a mask over the rows of all adapters", _MIXED, "mine = local + tl.arange(0, ROWS)",
           "mine = rows", (_ADAPTERS,)),
    Mutant("du of an adapter without its scale", _MIXED, 'input_precision="ieee") * scale',
           'input_precision="ieee")', (_ADAPTERS,)),
    Mutant("the last part of an adapter's dA", _MIXED, "_summed(da_parts, a[0].dtype)",
           "da_parts[-1].to(a[0].dtype)", ("low_rank_mixed-tall",)),
    Mutant("rows of nobody that nobody wrote", _MIXED,
           "(u.new_empty if plan.covers else u.new_zeros)", "u.new_empty", (_ADAPTERS,)),
    Mutant("segments that count their rows anew", "kernels/fused/mixed_plan.py",
           "local += end - start", "local += 0", (_ADAPTERS,)),
)  # fmt: skip

_OPS = "fastadapt/ops"
_CASE = "tests/test_low_rank.py::test_low_rank_and_its_gradients[{}-nf4-float32{}]"


def _gradients(more: str = "", implementation: str = "reference") -> tuple[str, ...]:
    return (_CASE.format(implementation, more),)


_GROUP = ("tests/test_low_rank_group.py", "-k", "its_gradients and reference-nf4-float32 and p0.3")

PACKAGE = (
    Mutant("no bias", f"{_OPS}/low_rank.py", "y += bias.to(y.dtype)", "y += 0", _gradients()),
    Mutant("no scale", f"{_OPS}/low_rank.py", "u @ (b * scale)", "u @ b",
           _gradients()),
    Mutant("dx by the transposed weight", f"{_OPS}/low_rank.py",
           "steps.product(dx, g, bits, compute, False)",
           "steps.product(dx, g, bits, compute, True)",
           _gradients()),
    Mutant("the gradients that are needed, mixed up", f"{_OPS}/low_rank.py",
           "need_x, need_bias, need_a, need_b = ctx", "need_x, need_a, need_bias, need_b = ctx",
           ("tests/test_low_rank.py", "-k", "gradients_that_are_needed and reference")),
    Mutant("no dx", f"{_OPS}/low_rank.py", "if need_x:", "if need_x and bits is None:",
           _gradients()),
    Mutant("a group's dx of one layer alone", f"{_OPS}/low_rank_group_steps.py", "dx += part",
           "dx = part", _GROUP),
    Mutant("one mask for a group", f"{_OPS}/low_rank_group_steps.py", "j == i else seeds[i:j]",
           "j == i else seeds[:1]", _GROUP),
    Mutant("a mask that backward does not share", f"{_OPS}/low_rank.py",
           "da = steps.down_grad(x, du, p, seed, a.dtype)",
           "da = steps.down_grad(x, du, p, None if seed is None else seed + 1, a.dtype)",
           _gradients("-p0.3")),
    Mutant("one seed for all", f"{_OPS}/dropout.py",
           "torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)",
           "torch.full((1,), 7, dtype=torch.int64, device=device)",
           ("tests/test_dropout.py", "-k", "follow_the_seed and reference")),
    Mutant("a gradient that was not dropped", f"{_OPS}/dropout.py",
           "return dropout_fwd(g, seed, ctx.p, g.dtype), None, None", "return g, None, None",
           ("tests/test_dropout.py", "-k", "so_is_its_gradient and reference and float32")),
    Mutant("the reference's nibbles in the wrong order", f"{_OPS}/nf4.py",
           "[code.repeat_interleave(16), code.repeat(16)]",
           "[code.repeat(16), code.repeat_interleave(16)]",
           ("tests/test_nf4.py", "-k", "bitsandbytes and reference and float32")),
    Mutant("a forced implementation that falls back", f"{_OPS}/dispatch.py",
           "if reason is not None:\n", "if reason is not None and False:\n",
           ("tests/test_dispatch.py", "-k", "runs_or_raises")),
    Mutant("an implementation that stays forced", f"{_OPS}/dispatch.py", "_forced.reset(token)",
           "pass", ("tests/test_dispatch.py", "-k", "use_ends")),
    Mutant("a reason that is not asked for", f"{_OPS}/dispatch.py", "reason = entry[1](*args)",
           "reason = None", ("tests/test_dispatch.py", "-k", "why_not_says or reasons_of")),
    Mutant("a buffer kept when it is too small", f"{_OPS}/scratch.py",
           "held is None or held.numel() < size", "held is None",
           ("tests/test_scratch.py",)),
    Mutant("autocast inside an op", f"{_OPS}/dispatch.py",
           "if not torch._C._is_any_autocast_enabled():", "if True:",
           ("tests/test_low_rank.py", "-k", "under_autocast and reference")),
    Mutant("a norm that forgets the scale", f"{_OPS}/row_norm.py", "scale * (b.to(wide) @",
           "1.0 * (b.to(wide) @", ("tests/test_row_norm.py", "-k", "reference and float32")),
    Mutant("a reflection's gradient without its sign", f"{_OPS}/reflect.py",
           "(grad.t() @ u).neg_()", "(grad.t() @ u)", ("tests/test_rotate.py", "-k", "reflect")),
    Mutant("a rotation turned back", f"{_OPS}/rotate.py", "-2 * q, left=False", "2 * q, left=False",
           ("tests/test_rotate.py", "-k", "cayley")),
)  # fmt: skip
ALL = {"kernels": KERNELS, "package": PACKAGE}


def main(kind: str) -> int:
    _warm_up(kind)
    sound = [k for mutant in ALL[kind] for k in mutant.killers] if kind == "kernels" else []
    found = {"sound": _forked(Mutant("sound", "", "", "", tuple(dict.fromkeys(sound))), kind)}
    if kind == "package":
        runs = dict.fromkeys(mutant.killers for mutant in ALL[kind])
        found["sound"] = any(_forked(Mutant("sound", "", "", "", run), kind) for run in runs)
    for mutant in ALL[kind]:
        found[mutant.name] = _forked(mutant, kind)
    json.dump(found, sys.stdout)
    return 0


def _warm_up(kind: str) -> None:
    """Third parties are imported once, before forking; never fastadapt."""
    import bitsandbytes.functional  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo
    import torch.testing._internal.optests
    import transformers  # noqa: F401
    import triton  # noqa: F401

    torch.set_num_threads(1)
    if (os.environ.get("TRITON_INTERPRET") == "1") != (kind == "kernels"):
        raise SystemExit("expected TRITON_INTERPRET=1 for kernels, and for them alone")


def _forked(mutant: Mutant, kind: str) -> bool:
    """Whether a killer failed, in a child that imports a changed copy."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _copy(root, mutant)
        child = os.fork()
        if child == 0:
            code = 2
            try:
                code = _killed(root, mutant, kind)
            except BaseException as error:
                os.write(2, repr(error).encode())
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 2:
        raise RuntimeError(f"{mutant.name}: the run itself failed")
    return code != 0


def _copy(root: Path, mutant: Mutant) -> None:
    skip = shutil.ignore_patterns("__pycache__")
    for part in ("fastadapt", "tests"):
        shutil.copytree(ROOT / part, root / part, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(ROOT / "kernels" / "fused", root / "fastadapt" / "kernels", ignore=skip)
    if mutant.path:
        path = root / mutant.path.replace("kernels/fused", "fastadapt/kernels")
        pieces = path.read_text(encoding="utf-8").split(mutant.old)
        if len(pieces) < mutant.nth + 2:
            raise RuntimeError(f"{mutant.name}: {mutant.old!r} is not in {mutant.path}")
        cut = mutant.nth + 1
        text = mutant.old.join(pieces[:cut]) + mutant.new + mutant.old.join(pieces[cut:])
        path.write_text(text, encoding="utf-8")


def _killed(root: Path, mutant: Mutant, kind: str) -> int:
    """1 when a killer failed, 0 when all passed."""
    import signal

    sys.path[:] = [str(root), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    os.chdir(root)
    signal.alarm(SECONDS if mutant.path else 10 * SECONDS)
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        import fastadapt.kernels

        if not str(fastadapt.kernels.__file__).startswith(str(root)):
            raise RuntimeError(f"the copy is not what is imported: {fastadapt.kernels.__file__}")
        if kind == "kernels":
            import torch

            torch.use_deterministic_algorithms(True, warn_only=True)
            from tests.triton_cases import CASES

            for name in mutant.killers:
                case = CASES[name]
                try:
                    case()
                except Exception:
                    return 1
            return 0
        import pytest

        done = pytest.main([*mutant.killers, "-q", "-x", "-p", "no:cacheprovider", "-p",
                            "no:benchmark"])  # fmt: skip
    if done not in (0, 1):
        os.write(2, sink.getvalue()[-1500:].encode())
        return 2
    return int(done)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
