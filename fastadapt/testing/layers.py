# SPDX-License-Identifier: Apache-2.0
"""A tiny layer of every format and kind, under every method."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import inject
from fastadapt.config import AdapterConfig, from_dict
from fastadapt.layer import AdaptedLayer
from fastadapt.methods import METHODS

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


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "LORA": {
        "lora": {"r": 4, "lora_alpha": 6},
        "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
        "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
        "lora_bias": {"r": 4, "lora_alpha": 6, "lora_bias": True},
        "lora_gaussian": {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian"},
        "qalora": {"r": 4, "use_qalora": True, "qalora_group_size": 4},
        "bdlora": {"r": 4, "use_bdlora": {"target_modules_bd_b": ["layer"], "nblocks": 2}},
        "kasa": {"r": 4, "kasa_config": {}},
    },
    "TRAINABLE_TOKENS": {"trainable_tokens": {"token_indices": [3, 40, 17]}},
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
        "miss_mini": {"r": 4, "mini_r": 2, "init_weights": "mini"},
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
    "PSOFT": {"psoft": {"r": 6, "psoft_alpha": 9}},
    "SUPERTUNING": {
        "supertuning": {"sparsity": 0.9}, "supra": {"sparsity": 0.9, "r": 3, "lora_alpha": 5},
    },
    "ADAMSS": {"adamss": {"r": 12, "num_subspaces": 3, "subspace_rank": 2}},
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
    *itertools.product(
        ("qalora", "bdlora", "kasa"), ("embedding", *(k for k in KINDS if k.startswith("conv2d")))
    ),
    ("trainable_tokens", "conv2d"), ("trainable_tokens", "conv2d_grouped"),
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


def _linear(fmt: str, *, bias: bool) -> nn.Module:
    if fmt.startswith("dense"):
        return nn.Linear(K, N, bias=bias)
    import bitsandbytes.nn as bnb

    if fmt == "bnb8":
        return bnb.Linear8bitLt(K, N, bias=bias, has_fp16_weights=False)  # type: ignore[no-any-return]
    layer = bnb.Linear4bit(K, N, bias=bias, compute_dtype=dtype_of(fmt))
    # the form that bitsandbytes repacks into at evaluation (AVX-512) keeps bf16 scales: other bits
    layer.support_avx512bf16_for_cpu = False
    return layer  # type: ignore[no-any-return]


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
