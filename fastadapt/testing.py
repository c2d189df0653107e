# SPDX-License-Identifier: Apache-2.0
"""Cases and the error budget that tests and benchmarks share: op inputs, and a tiny layer of every
format and kind under every method.

The budget: an op may err against float64 by twice what plain PyTorch errs in the same dtype, plus
one rounding of the largest value. It is computed for each case; no tolerance is typed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import inject
from fastadapt.config import AdapterConfig, from_dict
from fastadapt.layer import AdaptedLayer
from fastadapt.methods import METHODS
from fastadapt.ops.bits import Bits, Dense, Nf4
from fastadapt.ops.dropout import keep_mask, threshold

# the error budget


def error(got: Tensor, oracle: Tensor) -> float:
    """max |got - oracle|, in float64; NaN where ``got`` has one."""
    if oracle.numel() == 0:
        return 0.0
    return (got.detach().double() - oracle.detach()).abs().max().item()


def budget(plain: Tensor, oracle: Tensor, cost: float = 0.0) -> float:
    """2 x (the error of ``plain`` + cost) + one rounding, in plain's dtype, of the largest value.

    cost: what rounding the inputs once does to the value, where that was measured as well."""
    if oracle.numel() == 0:
        return 0.0
    unit = torch.finfo(plain.dtype).eps / 2
    return 2 * (error(plain, oracle) + cost) + unit * oracle.detach().abs().max().item()


def check(
    got: Tensor, plain: Tensor, oracle: Tensor, *, cost: float = 0.0, what: str = "value"
) -> None:
    """Raise AssertionError where ``got`` differs from ``plain`` in shape or dtype, or from the
    float64 ``oracle`` by more than the budget."""
    if (got.shape, got.dtype) != (plain.shape, plain.dtype):
        raise AssertionError(
            f"{what}: expected {tuple(plain.shape)} {plain.dtype}, "
            f"got {tuple(got.shape)} {got.dtype}"
        )
    off, allowed = error(got, oracle), budget(plain, oracle, cost)
    if not off <= allowed:
        raise AssertionError(f"{what}: expected an error of at most {allowed:.3g}, got {off:.3g}")


def as_float64(plain: Tensor, oracle: Tensor) -> Tensor:
    """A stand-in for plain PyTorch in float64, which is the oracle itself: the error of ``plain``,
    a float32 result, by the ratio of the roundings, and half again because the oracle errs too."""
    ratio = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return oracle.detach() + (plain.detach().double() - oracle.detach()) * ratio


# the low-rank op


@dataclass(frozen=True, kw_only=True)
class LowRankCase:
    """x: (m, k)  W: (n, k)  a: (r, k)  b: (n, r)  bias: (n,).

    bits:    none, dense, nf4 (nested absmax), nf4-flat, fp4
    dtype:   of x, of the product and of the result; pair: of a and b
    layout:  of x: rows (m, k), batch (.., k) with two leading sizes, strided, transposed
    """

    m: int = 17
    k: int = 64
    n: int = 48
    r: int = 8
    bits: str = "dense"
    dtype: torch.dtype = torch.float32
    pair: torch.dtype | None = None
    compute: torch.dtype | None = None
    p: float = 0.0
    bias: bool = True
    layout: str = "rows"
    scale: float = 1.7

    def __str__(self) -> str:
        shown = [self.bits, _short(self.dtype)]
        shown += [f"{key}{getattr(self, key)}" for key in "mknr"
                  if getattr(self, key) != getattr(LowRankCase, key)]  # fmt: skip
        shown += [f"p{self.p}"] if self.p else []
        shown += [] if self.bias else ["nobias"]
        shown += [self.layout] if self.layout != "rows" else []
        shown += [f"pair_{_short(self.pair)}"] if self.pair else []
        shown += [f"compute_{_short(self.compute)}"] if self.compute else []
        return "-".join(shown)

    def make(self, seed: int = 0, device: str = "cpu") -> LowRankInputs:
        """Fresh tensors, the same for the same seed. Needs bitsandbytes for 4-bit weights."""
        g = torch.Generator().manual_seed(seed)
        m, k, n, r, dtype = self.m, self.k, self.n, self.r, self.dtype
        x = _laid_out(torch.randn(m, k, generator=g).to(device, dtype), self.layout)
        w = torch.randn(n, k, generator=g) / k**0.5
        kept = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
        bits: Bits | None = None
        if self.bits == "dense":
            bits = Dense(w.to(dtype))
        elif self.bits != "none":
            kind, _, flat = self.bits.partition("-")
            bits = quantised(w.to(kept), kind, nested=not flat)
        pair = self.pair or dtype
        return LowRankInputs(
            x=x,
            bits=None if bits is None else moved(bits, device),
            w=None if bits is None else decoded(bits).to(device, self.compute or dtype),
            a=(torch.randn(r, k, generator=g) / k**0.5).to(device, pair),
            b=(torch.randn(n, r, generator=g) / r**0.5).to(device, pair),
            bias=torch.randn(n, generator=g).to(device, dtype) if self.bias else None,
            g=torch.randn(*x.shape[:-1], n, generator=g).to(device, dtype),
        )


@dataclass(frozen=True, kw_only=True)
class LowRankInputs:
    """w: the weight in ``bits``, as bitsandbytes decodes it; g: the gradient that comes in."""

    x: Tensor
    bits: Bits | None
    w: Tensor | None
    a: Tensor
    b: Tensor
    bias: Tensor | None
    g: Tensor


def plain_low_rank(
    x: Tensor, w: Tensor | None, a: Tensor, b: Tensor, bias: Tensor | None, scale: float,
    drop: Tensor | None = None, compute: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """y = x W^T + bias + s (x * drop) A^T B^T as one writes it without this library.

    drop: the factors of ``drop_factors``; compute: the dtype of the base product (default x's)"""
    dropped = x if drop is None else x * drop.to(x.dtype)
    y = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype)) * scale
    if w is not None:
        y = y + F.linear(x.to(compute or x.dtype), w.to(compute or x.dtype)).to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def drop_factors(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """0 or 1 / (1 - p) for each element, float64, p as the op rounds it."""
    numel = torch.Size(shape).numel()
    return (keep_mask(seed, numel, p).double() * (65536 / (65536 - threshold(p)))).view(*shape)


def quantised(w: Tensor, kind: str = "nf4", *, nested: bool = True, blocksize: int = 64) -> Nf4:
    """w: (n, k) as bitsandbytes stores it; ``kind``: nf4 or fp4."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        w, blocksize=blocksize, compress_statistics=nested, quant_type=kind
    )
    inner = state.state2 if nested else None
    return Nf4(
        packed, state.absmax, state.code, inner.absmax if inner else None,
        inner.code if inner else None, state.offset if inner else None, blocksize,
        inner.blocksize if inner else 0, w.shape[0], w.shape[1], w.dtype,
    )  # fmt: skip


def moved(bits: Bits, device: str) -> Bits:
    """The same bits on another device."""
    values: Any = [v.to(device) if isinstance(v, Tensor) else v for v in bits]
    return type(bits)(*values)


def decoded(bits: Bits) -> Tensor:
    """The weight (n, k) in ``bits.dtype``, by bitsandbytes where it is 4-bit."""
    if isinstance(bits, Dense):
        return bits.w
    import bitsandbytes.functional as bnb

    inner = None
    if bits.nested_absmax is not None:
        inner = bnb.QuantState(
            absmax=bits.nested_absmax, code=bits.nested_code, blocksize=bits.nested_blocksize,
            dtype=torch.float32,
        )  # fmt: skip
    state = bnb.QuantState(
        absmax=bits.absmax, shape=torch.Size(bits.shape), code=bits.code, dtype=bits.dtype,
        blocksize=bits.blocksize, quant_type="nf4" if bits.code[0] < 0 else "fp4",
        offset=bits.offset, state2=inner,
    )  # fmt: skip
    w: Tensor = bnb.dequantize_4bit(bits.packed.view(-1, 1), state)
    return w


# tiny layers of every format and kind

FORMATS = ("dense32", "dense16", "bnb4", "fp4", "bnb8")
KINDS = ("linear", "linear_nobias", "conv1d_gpt2", "embedding", "conv2d", "conv2d_grouped")
N, K, CHANNELS = 48, 64, 8


def exists(fmt: str, kind: str) -> bool:
    """Whether the library serves this format on this kind; ``base_layer`` makes the others too."""
    return fmt.startswith("dense") or kind in ("linear", "linear_nobias")


def base_layer(fmt: str, kind: str, seed: int = 0) -> nn.Module:
    """A frozen layer, W: (48, 64), a convolution's (48, 8, 3, 3), in (out, in, *kernel). Cells that
    nobody's loader makes (a 4-bit Conv1D) are put together by hand, so that what the library says
    of them can be tested."""
    from transformers.pytorch_utils import Conv1D

    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=g) / K**0.5
    layer: Any
    if kind == "embedding":
        layer, w = _embedding(fmt), w.t()
    elif kind == "conv1d_gpt2":
        layer, w = Conv1D(N, K), w.t()
    elif kind.startswith("conv2d"):
        groups = 2 if kind == "conv2d_grouped" else 1
        layer = nn.Conv2d(CHANNELS, N, 3, padding=1, stride=2, groups=groups)
        w = torch.randn(layer.weight.shape, generator=g) / K**0.5
    else:
        layer = _linear(fmt, bias=kind == "linear")
    if getattr(layer, "bias", None) is not None:
        layer.bias = nn.Parameter(torch.randn(N, generator=g))
    layer.weight = _stored(fmt, w.contiguous(), layer)
    return layer.to(dtype_of(fmt)).to("cpu").requires_grad_(False).eval()  # type: ignore[no-any-return]


def dtype_of(fmt: str) -> torch.dtype:
    """The dtype that activations of such a layer have."""
    return torch.bfloat16 if fmt in ("dense16", "fp4") else torch.float32


def layer_input(fmt: str, kind: str, *shape: int, seed: int = 0) -> Tensor:
    """(*shape, 64); token ids (*shape) for an embedding, images (shape[0], 8, 5, 5) for a
    convolution."""
    g = torch.Generator().manual_seed(seed)
    if kind == "embedding":
        return torch.randint(0, K, shape, generator=g)
    full = (shape[0], CHANNELS, 5, 5) if kind.startswith("conv2d") else (*shape, K)
    return torch.randn(full, generator=g).to(dtype_of(fmt))


# every method

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "LORA": {
        "lora": {"r": 4, "lora_alpha": 6},
        "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
        "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
        "lora_bias": {"r": 4, "lora_alpha": 6, "lora_bias": True},
        "lora_gaussian": {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian"},
    },
    "ADALORA": {"adalora": {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}},
    "VERA": {"vera": {"r": 8}},
    "PVERA": {"pvera": {"r": 8}},
    "VBLORA": {"vblora": {"num_vectors": 10, "vector_length": 4, "init_vector_bank_bound": 0.5}},
    "UNILORA": {"unilora": {"theta_d_length": 50, "init_theta_d_bound": 0.5}},
    "TINYLORA": {"tinylora": {"u": 6}},
    "RANDLORA": {
        "randlora": {"r": 8, "randlora_alpha": 8},
        "randlora_sparse": {"r": 5, "randlora_alpha": 5, "sparse": True},
    },
    "C3A": {"c3a": {"block_size": 4, "init_weights": True}},
    "FOURIERFT": {"fourierft": {"n_frequency": 60, "init_weights": True}},
    "WAVEFT": {
        "waveft": {"n_frequency": 60},
        "waveft_sym4": {"n_frequency": 60, "wavelet_family": "sym4"},
        "waveft_plain": {"n_frequency": 60, "use_idwt": False},
    },
    "IA3": {
        "ia3": {"feedforward_modules": []}, "ia3_input": {"feedforward_modules": ["layer"]},
    },
    "HIRA": {"hira": {"r": 4}},
    "MISS": {
        "miss": {"r": 4}, "miss_odd": {"r": 3}, "miss_bat": {"r": 4, "init_weights": "bat"},
        "miss_mini": {"r": 4, "mini_r": 6, "init_weights": "mini"},
    },
    "LOHA": {"loha": {"r": 4, "alpha": 6}},
    "LOKR": {
        "lokr": {"r": 2, "alpha": 3}, "lokr_full": {"r": 64, "alpha": 32},
        "lokr_both": {"r": 2, "alpha": 3, "decompose_both": True},
    },
    "ROAD": {
        f"road_{i}": {"variant": f"road_{i}", "group_size": 8} for i in (1, 2, 4)
    },
    "SHIRA": {"shira": {"r": 3}},
    "OFT": {
        "oft": {"oft_block_size": 8}, "oft_shared": {"oft_block_size": 8, "block_share": True},
        "oft_exact": {"oft_block_size": 8, "use_cayley_neumann": False},
    },
}  # fmt: skip
"""peft_type -> name -> fields, for methods that one default configuration does not cover."""

IMPOSSIBLE = {
    ("lora_bias", "embedding"), ("dora", "conv2d_grouped"), ("pvera", "conv2d_grouped"),
    ("ln_tuning", "bnb4"), ("ln_tuning", "fp4"), ("ln_tuning", "bnb8"),
    ("lily", "conv2d_grouped"),
}  # fmt: skip
"""(method case, kind or format) that cannot be: UnsupportedError says why."""

UNMERGEABLE = {
    *((case, "conv2d_grouped") for case in ("lora", "rslora", "lora_bias", "lora_gaussian")),
    *(("lily", kind) for kind in KINDS),
}
"""(method case, kind) that is no map of the form W': merging raises UnsupportedError."""

METHOD_CASES: dict[str, dict[str, Any]] = {
    name: {"peft_type": peft_type, "target_modules": ["layer"], **fields}
    for peft_type in METHODS
    for name, fields in VARIANTS.get(peft_type, {peft_type.lower(): {}}).items()
}


def config_of(case: str, **changes: Any) -> AdapterConfig:
    """A configuration that targets ``OneLayer``."""
    return from_dict({**METHOD_CASES[case], **changes})


class OneLayer(nn.Module):
    """A model of one layer, at the path "layer"."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def adapted(layer: nn.Module, *configs: AdapterConfig, start: bool = False) -> AdaptedLayer:
    """``layer`` under adapters "a0", "a1", .., all active, in evaluation mode.

    start: leave the adapters at their initial values, instead of moving each parameter away"""
    root = OneLayer(layer)
    for i, config in enumerate(configs):
        inject.attach(root, inject.plan(root, config), f"a{i}")
    found: AdaptedLayer = root.layer  # type: ignore[assignment]
    found.set_adapter([f"a{i}" for i in range(len(configs))])
    if not start:
        move(found)
    return found.eval()


def move(layer: AdaptedLayer, seed: int = 1) -> None:
    """Add N(0, 0.1) to each trained parameter: none is at its start, none is zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(layer):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g).to(parameter), alpha=0.1)


def adapter_parameters(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything but the base layer."""
    return [(k, p) for k, p in layer.named_parameters() if "base_layer" not in k.split(".")]


@contextmanager
def in_float64(
    layer: AdaptedLayer, noise: Callable[[Tensor], Tensor] = lambda t: t
) -> Iterator[None]:
    """Adapter parameters and buffers as float64, ``noise`` done to them, inside the ``with``."""
    buffers = [b for k, b in layer.named_buffers() if "base_layer" not in k.split(".")]
    tensors = [*(p for _, p in adapter_parameters(layer)), *buffers]
    held = [(t, t.data) for t in tensors if t.is_floating_point()]
    try:
        for parameter, data in held:
            parameter.data = noise(data.double())
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


def merged(
    layer: AdaptedLayer, names: Sequence[str], dtype: torch.dtype = torch.float64,
    noise: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(W', b') of these adapters, by their definition alone, from the base in ``dtype``, to which
    ``noise`` was done."""
    w, bias = layer.frozen.read()
    w, bias = noise(w.to(dtype)), None if bias is None else noise(bias.detach().to(dtype))
    for name in names:
        w, bias = layer.adapters[name].merged(w, bias)
    return w, bias


def applied(layer: AdaptedLayer, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's op with this weight and bias, in their dtype."""
    y = layer.frozen.apply(x.to(w.dtype) if x.is_floating_point() else x, w)
    return y if bias is None else y + layer.frozen.channels(bias.to(y.dtype))


# private


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _laid_out(x: Tensor, layout: str) -> Tensor:
    forms: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: x,
        "batch": lambda: x.view(2, x.shape[0] // 2, x.shape[1]),
        "strided": lambda: torch.stack([x, torch.full_like(x, torch.nan)], 2)[:, :, 0],
        "transposed": lambda: x.t().contiguous().t(),
    }
    return forms[layout]()


def _linear(fmt: str, *, bias: bool) -> nn.Module:
    if fmt.startswith("dense"):
        return nn.Linear(K, N, bias=bias)
    import bitsandbytes.nn as bnb

    if fmt == "bnb8":
        return bnb.Linear8bitLt(K, N, bias=bias, has_fp16_weights=False)  # type: ignore[no-any-return]
    return bnb.Linear4bit(K, N, bias=bias, compute_dtype=dtype_of(fmt))  # type: ignore[no-any-return]


def _embedding(fmt: str) -> nn.Module:
    if fmt.startswith("dense"):
        return nn.Embedding(K, N)
    import bitsandbytes.nn as bnb

    cls = {"bnb4": bnb.EmbeddingNF4, "fp4": bnb.EmbeddingFP4, "bnb8": bnb.Embedding8bit}[fmt]
    return cls(K, N)  # type: ignore[no-any-return]


def _stored(fmt: str, w: Tensor, layer: nn.Module) -> nn.Parameter:
    if fmt.startswith("dense"):
        return nn.Parameter(w)
    import bitsandbytes.nn as bnb

    if fmt == "bnb8":
        rows = w.flatten(1)
        return bnb.Int8Params(rows, requires_grad=False, has_fp16_weights=False)  # type: ignore[no-any-return]
    return bnb.Params4bit(  # type: ignore[no-any-return]
        w, requires_grad=False, blocksize=64, compress_statistics=True,
        quant_type="nf4" if fmt == "bnb4" else "fp4", module=layer,
    )  # fmt: skip
