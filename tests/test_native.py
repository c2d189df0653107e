# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels: bit-equal to bitsandbytes, and to a philox written here in Python."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.errors import KernelError
from fastadapt.ops import native

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*HALVES_AND_FLOAT, torch.float64)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


def name(value: object) -> str:
    return str(value).replace("torch.", "").replace(" ", "")


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Signed zeros count; NaNs must stand in the same places, their payload is free."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    as_int = BITS.get(got.dtype, torch.int16)
    assert torch.equal(
        got.nan_to_num(0.0).contiguous().view(as_int),
        want.nan_to_num(0.0).contiguous().view(as_int),
    )


# nf4_dequant_ --------------------------------------------------------------------------------


def quantised(
    numel: int, blocksize: int, kind: str = "nf4", *, nested: bool, seed: int = 0
) -> tuple[Any, ...]:
    """Random bytes and statistics in the order of nf4_dequant_'s arguments, without dtype."""
    functional = pytest.importorskip("bitsandbytes.functional")
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8, generator=g)
    code = functional.get_4bit_type(kind, device="cpu")
    blocks = -(-numel // blocksize)
    absmax: tuple[Tensor | None, ...] = (torch.rand(blocks, generator=g), code, None, None, None)
    if nested:
        indices = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=g)
        nested_absmax = torch.rand(-(-blocks // 256), generator=g)
        offset = torch.rand((), generator=g)
        absmax = (indices, code, nested_absmax, functional.create_dynamic_map(), offset)
    return packed, *absmax, blocksize, 256


def by_bitsandbytes(bits: tuple[Any, ...], kind: str, numel: int, dtype: torch.dtype) -> Tensor:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, absmax, code, nested_absmax, nested_code, offset, blocksize, nested_blocksize = bits
    inner = None
    if nested_absmax is not None:
        inner = functional.QuantState(
            absmax=nested_absmax, code=nested_code, blocksize=nested_blocksize, dtype=torch.float32
        )
    state = functional.QuantState(
        absmax=absmax, shape=torch.Size([numel]), code=code, blocksize=blocksize, quant_type=kind,
        dtype=dtype, offset=offset, state2=inner,
    )  # fmt: skip
    return functional.dequantize_4bit(packed.view(-1, 1), state).view(-1)


def decoded(bits: tuple[Any, ...], numel: int, dtype: torch.dtype, out: torch.dtype) -> Tensor:
    w = torch.full((numel,), float("nan"), dtype=out)
    native.nf4_dequant_(w, *bits, dtype)
    return w


@needs_native
@pytest.mark.native
@pytest.mark.parity
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=name)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("numel", [2, 30, 64, 998, 40_000, 300_002])
def test_nf4_has_the_bits_of_bitsandbytes(
    numel: int, blocksize: int, kind: str, nested: bool, dtype: torch.dtype
) -> None:
    bits = quantised(numel, blocksize, kind, nested=nested, seed=numel)
    got, want = decoded(bits, numel, dtype, dtype), by_bitsandbytes(bits, kind, numel, dtype)
    if kind == "fp4":
        # bitsandbytes' CPU kernel reads nibble 8 as -0.0, its own table says 0.0: adding 0.0
        # leaves every other bit as it is
        got, want = got + 0.0, want + 0.0
    assert_same_bits(got, want)


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("numel", [1, 63, 999])
def test_nf4_odd_numel_ignores_the_last_nibble(numel: int) -> None:
    bits = quantised(numel, 64, nested=True)
    longer = decoded(bits, numel + 1, torch.float32, torch.float32)
    assert_same_bits(decoded(bits, numel, torch.float32, torch.float32), longer[:numel])


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("out", HALVES_AND_FLOAT, ids=name)
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=name)
@pytest.mark.parametrize("blocksize", [6, 50, 64])
def test_nf4_rounds_to_dtype_then_stores(
    blocksize: int, dtype: torch.dtype, out: torch.dtype
) -> None:
    bits = quantised(1000, blocksize, nested=True)
    want = decoded(bits, 1000, torch.float32, torch.float32).to(dtype).to(out)
    assert_same_bits(decoded(bits, 1000, dtype, out), want)


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("out", HALVES_AND_FLOAT, ids=name)
def test_nf4_extreme_scales_round_as_torch_does(out: torch.dtype) -> None:
    scales = [0.0, -0.0, -1.5, 1e-45, 1e-41, 3e-8, 6e-5, 65504.0, 65520.0, 7e4, 3.4e38]
    absmax = torch.tensor([*scales, float("inf"), float("nan")])
    packed, _, code, *rest = quantised(64 * len(absmax), 64, nested=False)
    nibbles = torch.stack([packed >> 4, packed & 15], 1).view(-1, 64).long()
    want = (code[nibbles] * absmax[:, None]).to(out).view(-1)
    got = decoded((packed, absmax, code, *rest), want.numel(), out, out)
    assert_same_bits(got, want)


@needs_native
@pytest.mark.native
def test_nf4_bits_do_not_depend_on_the_number_of_threads() -> None:
    bits = quantised(300_002, 64, nested=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = decoded(bits, 300_002, torch.bfloat16, torch.float32)
        torch.set_num_threads(3)
        assert_same_bits(decoded(bits, 300_002, torch.bfloat16, torch.float32), one)
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.native
def test_nf4_writes_out_and_nothing_around_it() -> None:
    bits = quantised(998, 64, nested=False)
    room = torch.full((998 + 64,), 7.0, dtype=torch.bfloat16)
    native.nf4_dequant_(room[32 : 32 + 998], *bits, torch.bfloat16)
    assert torch.equal(room[:32], torch.full((32,), 7.0, dtype=torch.bfloat16))
    assert torch.equal(room[-32:], torch.full((32,), 7.0, dtype=torch.bfloat16))


NF4_FIELDS = (
    "out", "packed", "absmax", "code", "nested_absmax", "nested_code", "offset", "blocksize",
    "nested_blocksize", "dtype",
)  # fmt: skip


@needs_native
@pytest.mark.native
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("out", torch.empty(102), "packed must have 51 elements, got 50"),
        ("out", torch.empty(100, dtype=torch.float64), "out must be float32, bfloat16 or float16"),
        ("out", torch.empty(100, 2)[:, 0], "out must be contiguous"),
        ("packed", torch.zeros(50, dtype=torch.int8), "packed must be Byte, got Char"),
        ("packed", torch.zeros(49, dtype=torch.uint8), "packed must have 50 elements, got 49"),
        ("absmax", torch.zeros(1, dtype=torch.uint8), "absmax must have 2 elements, got 1"),
        ("absmax", torch.zeros(2), "absmax must be uint8 where nested_absmax"),
        ("code", torch.zeros(15), "code must have 16 elements, got 15"),
        ("code", torch.zeros(16, dtype=torch.float64), "code must be Float, got Double"),
        ("nested_absmax", None, "a uint8 absmax needs .*, got no nested_absmax"),
        ("nested_absmax", torch.zeros(2), "nested_absmax must have 1 elements, got 2"),
        ("nested_code", torch.zeros(255), "nested_code must have 256 elements, got 255"),
        ("offset", torch.zeros(0), "offset must have 1 elements, got 0"),
        ("blocksize", 0, "blocksize must be positive and even, got 0"),
        ("blocksize", 33, "blocksize must be positive and even, got 33"),
        ("nested_blocksize", 0, "nested_blocksize must be positive, got 0"),
        ("dtype", torch.float64, "dtype must be float32, bfloat16 or float16, got Double"),
    ],
)
def test_nf4_refuses_what_does_not_fit(field: str, value: object, message: str) -> None:
    bits = quantised(100, 64, nested=True)
    args = dict(zip(NF4_FIELDS, (torch.empty(100), *bits, torch.float32), strict=True))
    native.nf4_dequant_(**args)
    with pytest.raises(RuntimeError, match=message):
        native.nf4_dequant_(**{**args, field: value})


# nf4_product_ --------------------------------------------------------------------------------


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("transposed", [True, False], ids=["xWt", "xW"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 17])
@pytest.mark.parametrize(
    ("n", "k", "blocksize"), [(5, 64, 64), (37, 192, 64), (9, 1024, 128), (130, 640, 32)]
)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_nf4_product_is_within_the_bound_of_a_dot_product(
    n: int, k: int, blocksize: int, nested: bool, tokens: int, transposed: bool
) -> None:
    bits = quantised(n * k, blocksize, nested=nested, seed=n)
    w = decoded(bits, n * k, torch.bfloat16, torch.float32).view(n, k)
    w = w.t() if transposed else w
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, w.shape[0], generator=g)
    start = torch.randn(tokens, w.shape[1], generator=g)
    y = start.clone()
    native.nf4_product_(y, x, *bits, n, k, torch.bfloat16, transposed)
    exact = start.double() + x.double() @ w.double()
    terms = w.shape[0] + 1
    bound = terms * 2**-24 * (start.abs().double() + x.abs().double() @ w.abs().double())
    assert ((y.double() - exact).abs() <= bound).all()


needs_bf16 = pytest.mark.skipif(
    native.isa() < native.AVX512_BF16, reason="this CPU has no AVX-512 BF16"
)


@needs_native
@needs_bf16
@pytest.mark.native
@pytest.mark.parametrize("transposed", [True, False], ids=["xWt", "xW"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 6, 17])
@pytest.mark.parametrize(
    ("n", "k", "blocksize"),
    [(1, 64, 64), (5, 64, 64), (37, 192, 64), (65, 1024, 128), (130, 640, 64)],
)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_nf4_product_in_bf16_rounds_once(
    n: int, k: int, blocksize: int, nested: bool, tokens: int, transposed: bool
) -> None:
    bits = quantised(n * k, blocksize, nested=nested, seed=n)
    w = decoded(bits, n * k, torch.bfloat16, torch.float32).view(n, k)
    w = w.t() if transposed else w
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, w.shape[0], generator=g).bfloat16()
    start = torch.randn(tokens, w.shape[1], generator=g).bfloat16()
    room = torch.full((tokens * w.shape[1] + 64,), 7.0, dtype=torch.bfloat16)
    y = room[31 : 31 + start.numel()].view_as(start).copy_(start)
    native.nf4_product_(y, x, *bits, n, k, torch.bfloat16, transposed)
    exact = start.double() + x.double() @ w.double()
    terms = w.shape[0] + 1
    bound = terms * 2**-24 * (start.abs().double() + x.abs().double() @ w.abs().double())
    assert ((y.double() - exact).abs() <= 1.01 * bound + 2**-8 * exact.abs()).all()
    assert (room[:31] == 7).all()
    assert (room[31 + start.numel() :] == 7).all()


@needs_native
@needs_bf16
@pytest.mark.native
def test_nf4_product_in_bf16_does_not_depend_on_the_number_of_threads() -> None:
    n, k = 514, 2112
    bits = quantised(n * k, 64, nested=True)
    x, g = torch.randn(7, k).bfloat16(), torch.randn(7, n).bfloat16()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y, dx = torch.zeros_like(g), torch.zeros_like(x)
        native.nf4_product_(y, x, *bits, n, k, torch.bfloat16, True)
        native.nf4_product_(dx, g, *bits, n, k, torch.bfloat16, False)
        results.append((y, dx))
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


@needs_native
@pytest.mark.native
def test_nf4_product_does_not_depend_on_the_number_of_threads() -> None:
    bits = quantised(512 * 2048, 64, nested=True)
    x, g = torch.randn(4, 2048), torch.randn(4, 512)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y, dx = torch.zeros(4, 512), torch.zeros(4, 2048)
        native.nf4_product_(y, x, *bits, 512, 2048, torch.bfloat16, True)
        native.nf4_product_(dx, g, *bits, 512, 2048, torch.bfloat16, False)
        results.append((y, dx))
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


@needs_native
@pytest.mark.native
def test_nf4_product_refuses_what_does_not_fit() -> None:
    bits = quantised(4 * 96, 64, nested=False)
    with pytest.raises(RuntimeError, match="divide k"):
        native.nf4_product_(
            torch.zeros(1, 4), torch.zeros(1, 96), *bits, 4, 96, torch.float32, True
        )
    bits = quantised(4 * 64, 64, nested=False)
    with pytest.raises(RuntimeError, match="x must have 64"):
        native.nf4_product_(
            torch.zeros(1, 4), torch.zeros(1, 60), *bits, 4, 64, torch.float32, True
        )


# dropout -------------------------------------------------------------------------------------


def philox_lanes(seed: int, numel: int) -> Tensor:
    """The 16-bit lane of each element, from the paper's definition, in Python integers."""
    word = 0xFFFFFFFF
    lanes = []
    for counter in range(-(-numel // 8)):
        c = [counter & word, counter >> 32, 0, 0]
        k0, k1 = seed & word, (seed >> 32) & word
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ k0, b & word, (a >> 32) ^ c[3] ^ k1, a & word]
            k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
        lanes += [half for w in c for half in (w & 0xFFFF, w >> 16)]
    return torch.tensor(lanes[:numel], dtype=torch.int64)


def dropped(x: Tensor, seed: int, p: float, out: torch.dtype) -> Tensor:
    threshold = round(p * 65536)
    wide = x if x.dtype == torch.float64 else x.float()
    keep = (philox_lanes(seed, x.numel()) >= threshold).view(x.shape)
    scale = torch.tensor(65536 / (65536 - threshold), dtype=wide.dtype)
    return (wide * (keep * scale)).to(out)


def seed_of(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)


def test_the_oracle_is_philox4x32_10() -> None:
    """Known answer for counter 0 and key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    want = [0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]
    assert philox_lanes(0, 8).tolist() == want


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("out", FLOATS, ids=name)
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 513, 2043])
def test_dropout_has_the_bits_of_its_definition(
    numel: int, dtype: torch.dtype, out: torch.dtype
) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    got = native.dropout(x, seed_of(1234), 0.3, out)
    assert_same_bits(got, dropped(x, 1234, 0.3, out))


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("seed", [0, 1, -1, 2**31 - 1, 2**32 + 5, (1 << 40) + 7, -(2**63)])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 2.5 / 65536, 3.5 / 65536, 65535 / 65536])
def test_dropout_seeds_and_thresholds(seed: int, p: float) -> None:
    x = torch.randn(1027, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = native.dropout(x, seed_of(seed), p, torch.float32)
    assert_same_bits(got, dropped(x, seed, p, torch.float32))


@needs_native
@pytest.mark.native
def test_dropout_of_a_strided_x_counts_in_its_contiguous_order() -> None:
    x = torch.randn(37, 3, 22, generator=torch.Generator().manual_seed(2)).permute(2, 0, 1)[::2]
    got = native.dropout(x, seed_of(9), 0.4, torch.bfloat16)
    assert got.is_contiguous()
    assert_same_bits(got, dropped(x.contiguous(), 9, 0.4, torch.bfloat16))


@needs_native
@pytest.mark.native
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_dropout_of_values_that_are_not_finite_or_tiny(dtype: torch.dtype) -> None:
    values = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 6e-8, 6e4, 3.3e38]
    x = torch.tensor(values, dtype=torch.float64).repeat_interleave(40).to(dtype)
    for out in FLOATS:
        got = native.dropout(x, seed_of(3), 0.5, out)
        assert_same_bits(got, dropped(x, 3, 0.5, out))


@needs_native
@pytest.mark.native
def test_dropout_bits_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.ones(200_003)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native.dropout(x, seed_of(5), 0.1, torch.float32)
        torch.set_num_threads(3)
        assert_same_bits(native.dropout(x, seed_of(5), 0.1, torch.float32), one)
    finally:
        torch.set_num_threads(threads)
    # A lane is dropped with probability q = threshold / 65536: six standard deviations
    q = round(0.1 * 65536) / 65536
    spread = 6 * (q * (1 - q) / x.numel()) ** 0.5
    assert abs((one == 0).double().mean().item() - q) < spread


@needs_native
@pytest.mark.native
@pytest.mark.parametrize(
    ("x", "seed", "p", "out", "message"),
    [
        (torch.ones(8).int(), seed_of(0), 0.1, torch.float32, "x must be .*, got Int"),
        (torch.ones(8), seed_of(0), 0.1, torch.int32, "out_dtype must be .*, got Int"),
        (torch.ones(8), seed_of(0).int(), 0.1, torch.float32, "seed must be Long, got Int"),
        (torch.ones(8), seed_of(0).repeat(2), 0.1, torch.float32, "seed must have 1 elements"),
        (torch.ones(8), seed_of(0), 1.0, torch.float32, r"p must be in \[0, 1\)"),
        (torch.ones(8), seed_of(0), -0.1, torch.float32, r"p must be in \[0, 1\)"),
        (torch.ones(8), seed_of(0), float("nan"), torch.float32, r"p must be in \[0, 1\)"),
    ],
)
def test_dropout_refuses_what_does_not_fit(
    x: Tensor, seed: Tensor, p: float, out: torch.dtype, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        native.dropout(x, seed, p, out)


# loading -------------------------------------------------------------------------------------


def native_in(package: Path) -> ModuleType:
    """The loader as it would be in a package of that folder."""
    (package / "ops").mkdir(parents=True)
    copy = package / "ops" / "native.py"
    copy.write_text(Path(str(native.__file__)).read_text())
    spec = importlib.util.spec_from_file_location("native_copy", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_the_library_it_says_how_to_build_it(tmp_path: Path) -> None:
    loader = native_in(tmp_path / "package")
    assert not loader.available()
    assert "not built" in loader.why_not()
    with pytest.raises(KernelError, match="C\\+\\+ compiler"):
        loader.dropout(torch.ones(8), seed_of(0), 0.1, torch.float32)


def test_a_broken_library_is_tried_once(tmp_path: Path) -> None:
    package = tmp_path / "package"
    loader = native_in(package)
    (package / "_C.so").write_bytes(b"not a library")
    reason = loader.why_not()
    assert "failed to load" in reason
    (package / "_C.so").unlink()
    assert loader.why_not() == reason


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_says_what_is_missing(tmp_path: Path) -> None:
    root, lib = Path(__file__).resolve().parents[1], tmp_path / "lib"
    missing = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base"),
         "--build-lib", str(lib)],
        cwd=root, env={**os.environ, **missing}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "the native extension did not compile" in built.stderr
    assert not list(lib.glob("fastadapt/_C*"))
    script = "import fastadapt.cli as c, sys; sys.argv = ['fastadapt', 'doctor']; c.main()"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(lib), "COLUMNS": "200"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert "fastadapt._C is not built; install again where a C++ compiler and torch are" in said
