# SPDX-License-Identifier: Apache-2.0
"""LoftQ: the pair starts as the best rank-r correction of what quantising W loses.

    repeat: Q = quantise(W - s b a);  s b a = the r largest singular values of W - Q

The base keeps Q.

``replace_lora_weights_loftq`` does the last step on a model that is in 4 bits already, from the
file of its full weights. Nothing here needs a GPU. Source: LoftQ (arXiv 2310.08659).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.errors import ConfigError, UnsupportedError
from fastadapt.inits.init import FromWeight


@dataclass
class LoftQConfig:
    """loftq_bits: 4 (NF4) or 8 (int8 rows); loftq_iter: how often the two steps are repeated."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8):
            raise ConfigError(f"loftq_bits: expected 4 or 8, got {self.loftq_bits!r}")
        if not isinstance(self.loftq_iter, int) or self.loftq_iter < 1:
            raise ConfigError(f"loftq_iter: expected a positive integer, got {self.loftq_iter!r}")


class LoftQ(FromWeight):
    changes_base = True

    def pair(self, w: Tensor, base: Base, config: Any) -> tuple[Tensor, Tensor]:
        return _alternate(w, config)[1:]

    def residual(self, w: Tensor, a: Tensor, b: Tensor, config: Any) -> Tensor:
        return _alternate(w.flatten(1), config)[0].view(w.shape)


def low_rank_of(error: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """(a, b) of rank r with s b a nearest to ``error``."""
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return root.unsqueeze(1) * vt[:r], u[:, :r] * root


def _alternate(w: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = LoftQConfig(**config.loftq_config)
    target = w
    for _ in range(options.loftq_iter):
        q = _quantised(target, options.loftq_bits)
        if torch.equal(q, w):
            raise UnsupportedError(
                "init_lora_weights='loftq': the weight is quantised already and nothing is left to "
                "correct; use replace_lora_weights_loftq with the file of its full weights"
            )
        # PEFT leaves out s, and so corrects too much whenever alpha is not r
        a, b = low_rank_of(w - q, config.r, config.scaling)
        target = w - config.scaling * (b @ a)
    return q, a, b


def _quantised(w: Tensor, bits: int) -> Tensor:
    """w after a trip through NF4 (blocks of 64) or int8 rows."""
    if bits == 8:
        top = w.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny) / 127
        return (w / top).round() * top
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # a copy: at a later call bitsandbytes may pack in place on some CPUs
    packed, state = quantize_4bit(w.contiguous().clone(), blocksize=64, quant_type="nf4")
    back: Tensor = dequantize_4bit(packed, state)
    return back


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set each pair over a 4-bit layer to the best correction of its quantisation error, with the
    full weights read one at a time from safetensors.

    model_path: the file, or a folder with one or with an index; None: the base's own folder, as
    its config names it. callback(model, path): False puts that layer's old values back.
    Raises ConfigError when there is no 4-bit layer with the adapter, or no file."""
    found = [
        (name, module)
        for name, module in peft_model.named_modules()
        if adapter_name in getattr(module, "lora_A", {})
        and getattr(getattr(module, "frozen", None), "weight", None) is not None
        and module.frozen.weight.name == "bnb4"
    ]
    if not found:
        raise ConfigError(f"No bnb LoRA module found on the model, of adapter {adapter_name!r}")
    weights = _Weights(peft_model, model_path)
    for name, module in found:
        layer: Any = module
        path = name.removeprefix("base_model.model.")
        full = weights[f"{path}.weight"].to(layer.weight.device, torch.float32)
        scale, r = layer.scaling[adapter_name], layer.r[adapter_name]
        values = low_rank_of(full - layer.frozen.read()[0].float(), r, scale)
        pair = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        before = [t.clone() for t in pair]
        for tensor, value in zip(pair, values, strict=True):
            tensor.copy_(value)
        if callback is not None and not callback(peft_model, path):
            for tensor, value in zip(pair, before, strict=True):
                tensor.copy_(value)


class _Weights:
    """key -> tensor, from a safetensors file or a folder of shards."""

    def __init__(self, model: Any, path: str | None) -> None:
        where = path or getattr(getattr(model, "config", None), "_name_or_path", None)
        if not where:
            raise ConfigError(
                "replace_lora_weights_loftq: the model does not say where its weights are, pass "
                "model_path, the safetensors file"
            )
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        folder = Path(where)
        index = folder / "model.safetensors.index.json"
        if folder.is_file():
            self._files, self._map = [folder], None
        elif (folder / "model.safetensors").is_file():
            self._files, self._map = [folder / "model.safetensors"], None
        elif index.is_file():
            self._map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._files = [folder]
        else:
            raise ConfigError(
                f"replace_lora_weights_loftq: no safetensors file of weights at {where}"
            )

    def __getitem__(self, key: str) -> Tensor:
        from safetensors import safe_open

        for name in (key, key.removeprefix(self._prefix)):
            if self._map is not None and name not in self._map:
                continue
            file = self._files[0] if self._map is None else self._files[0] / self._map[name]
            with safe_open(file, framework="pt", device="cpu") as held:
                if name in held.keys():  # noqa: SIM118
                    tensor: Tensor = held.get_tensor(name)
                    return tensor
        raise ConfigError(f"replace_lora_weights_loftq: no tensor {key} in {self._files[0]}")
