# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: 4-bit codebook weights (NF4, FP4; nested absmax or not) and int8 rows."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.ops.bits import Nf4
from fastadapt.ops.nf4 import nf4_dequant
from fastadapt.weights.refit import refit
from fastadapt.weights.sixteen import Linear16
from fastadapt.weights.weight import Weight

_REPACK = "support_avx512bf16_for_cpu"
_BEFORE = "_fastadapt_repacks"


class Bnb4bit(Weight):
    """``bitsandbytes.nn.Linear4bit``.

    On a CPU with AVX-512 bf16, bitsandbytes repacks the weight in place at the first evaluation;
    the packed form has no backward and does not decode as the other (bitsandbytes #2078). So the
    repacking is off while the model has adapters, and a packed weight is unpacked.
    """

    name = "bnb4"

    @classmethod
    def claims(cls, layer: nn.Module) -> bool:
        return _is(layer, "Linear4bit") and type(layer.weight).__name__ == "Params4bit"

    def attach(self) -> None:
        layer = self.layer
        if hasattr(layer, _REPACK) and _BEFORE not in layer.__dict__:
            layer.__dict__[_BEFORE] = getattr(layer, _REPACK)
            setattr(layer, _REPACK, False)
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            data, state = _convert_weight_packed_for_cpu_inverse(
                layer.weight.data, layer.weight.quant_state
            )
            layer.weight.data, layer.weight.quant_state, layer.quant_state = data, state, state

    def detach(self) -> None:
        if _BEFORE in self.layer.__dict__:
            setattr(self.layer, _REPACK, self.layer.__dict__.pop(_BEFORE))

    @property
    def dtype(self) -> torch.dtype:
        # PEFT's rule: start values are rounded to the compute dtype, then widened
        return self.layer.compute_dtype or torch.get_default_dtype()

    def bits(self) -> Nf4:
        weight = self.layer.weight
        # after FSDP's all-gather the weight is a plain tensor and only the module has the state
        state = getattr(weight, "quant_state", None) or self.layer.quant_state
        nested = state.state2 if state.nested else None
        n, k = state.shape
        packed = weight.detach()
        return Nf4(
            packed=packed if packed.dtype == torch.uint8 else packed.view(torch.uint8),
            absmax=state.absmax,
            code=state.code,
            nested_absmax=nested.absmax if nested else None,
            nested_code=nested.code if nested else None,
            # bitsandbytes unpacks a weight with a bfloat16 offset
            offset=state.offset.float() if nested else None,
            blocksize=state.blocksize,
            nested_blocksize=nested.blocksize if nested else 0,
            n=n,
            k=k,
            dtype=state.dtype,
        )

    def compute(self, x: Tensor) -> torch.dtype:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.layer.compute_dtype or x.dtype

    def read(self) -> Tensor:
        return nf4_dequant(self.bits())

    def write(self, w: Tensor) -> None:
        old, layer = self.layer.weight, self.layer
        layer.weight = type(old)(
            w.float().contiguous(), requires_grad=False, blocksize=old.blocksize,
            compress_statistics=old.compress_statistics, quant_type=old.quant_type,
            quant_storage=old.quant_storage, module=layer,
        ).to(old.device)  # fmt: skip
        layer.weight.quant_state.dtype = old.quant_state.dtype

    def refit(self, w: Tensor) -> None:
        """On the scales that the weight has or on those that ``w`` itself asks for, whichever
        leaves the smaller error."""
        layer, old = self.layer, self.bits()
        state = copy.deepcopy(layer.weight.quant_state)
        change = w.float() - self.read().float()
        before = nf4_dequant(old._replace(dtype=torch.float32))
        self.write(w)
        errors, packed = [], []
        for bits in (old, self.bits()):
            scale, (levels, places) = _scales(bits), _levels(bits.code)
            index = refit(before, change, levels, scale)
            errors.append((levels[index] * scale - before - change).square().sum())
            packed.append(_packed(places[index], bits.packed))
        stays = bool(errors[0] <= errors[1])
        if stays:
            layer.weight.quant_state = layer.quant_state = state
        data = layer.weight.data
        layer.weight.data = packed[0 if stays else 1].view(data.dtype).view(data.shape)

    def in_16_bit(self, w: Tensor, bias: Tensor | None) -> nn.Module:
        return _dense(self, w, bias, self.layer.compute_dtype)

    def snapshot(self) -> tuple[Any, ...]:
        return self.layer.weight, self.layer.quant_state

    def restore(self, held: tuple[Any, ...]) -> None:
        self.layer.weight, self.layer.quant_state = held


class Bnb8bit(Weight):
    """``bitsandbytes.nn.Linear8bitLt``: w = CB * SCB / 127, row by row.

    The layer also quantises its input, so only the layer itself can multiply."""

    name = "bnb8"

    @classmethod
    def claims(cls, layer: nn.Module) -> bool:
        return _is(layer, "Linear8bitLt") and type(layer.weight).__name__ == "Int8Params"

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.layer.weight.dtype
        return dtype if dtype.is_floating_point else torch.get_default_dtype()

    def read(self) -> Tensor:
        weight: Tensor = self.layer.weight
        if weight.dtype != torch.int8:
            return weight.detach()
        return weight.data.float() * (self._rows().float().view(-1, 1) / 127)

    def write(self, w: Tensor) -> None:
        old, layer = self.layer.weight, self.layer
        # bitsandbytes quantises on the way from the CPU only
        layer.weight = type(old)(
            w.float().contiguous().cpu(), requires_grad=False, has_fp16_weights=old.has_fp16_weights
        ).to(old.device)
        layer.state.CB = layer.state.SCB = None

    def refit(self, w: Tensor) -> None:
        """On the rows' scales or on those that ``w`` itself asks for, whichever leaves the smaller
        error."""
        if self.layer.weight.dtype != torch.int8:
            self.write(w)
            return
        before, old = self.read().float(), self._rows()
        change = w.float() - before
        levels = torch.arange(-127, 128, device=w.device).float() / 127
        self.write(w)
        weight = self.layer.weight
        errors, found, scales = [], [], (old.float().view(-1, 1), weight.SCB.float().view(-1, 1))
        for scale in scales:
            index = refit(before, change, levels, scale)
            errors.append((levels[index] * scale - before - change).square().sum())
            found.append((index - 127).to(torch.int8))
        stays = bool(errors[0] <= errors[1])
        weight.data = weight.CB = found[0 if stays else 1]
        if stays:
            weight.SCB = old.clone()

    def in_16_bit(self, w: Tensor, bias: Tensor | None) -> nn.Module | None:
        return _dense(self, w, bias, None) if self.layer.weight.dtype == torch.int8 else None

    def _rows(self) -> Tensor:
        """SCB, wherever bitsandbytes keeps it at the moment."""
        state, weight = self.layer.state, self.layer.weight
        rows: Tensor = state.SCB if state.SCB is not None else weight.SCB
        return rows

    def snapshot(self) -> tuple[Any, ...]:
        weight, state = self.layer.weight, self.layer.state
        return weight, weight.CB, weight.SCB, state.CB, state.SCB

    def restore(self, held: tuple[Any, ...]) -> None:
        layer = self.layer
        layer.weight, layer.weight.CB, layer.weight.SCB, layer.state.CB, layer.state.SCB = held


def _scales(bits: Nf4) -> Tensor:
    """absmax of the block of each value: (n, k)."""
    ones = torch.ones_like(bits.code)
    return nf4_dequant(bits._replace(code=ones, dtype=torch.float32))


def _levels(code: Tensor) -> tuple[Tensor, Tensor]:
    """The different values of a codebook, ascending, and the place of each in it."""
    levels, inverse = code.float().unique(return_inverse=True)
    places = torch.zeros_like(levels, dtype=torch.long)
    return levels, places.scatter(0, inverse, torch.arange(len(code), device=code.device))


def _packed(codes: Tensor, like: Tensor) -> Tensor:
    """(n, k) codes, two a byte, the even one in the high half, as many bytes as ``like``."""
    flat = codes.flatten().to(torch.uint8)
    whole = torch.zeros(like.numel() * 2, dtype=torch.uint8, device=codes.device)
    whole[: len(flat)] = flat
    return whole[::2] << 4 | whole[1::2]


def _dense(weight: Weight, w: Tensor, bias: Tensor | None, compute: Any) -> nn.Module:
    """In the half precision that the layer computes in, else in bfloat16."""
    half = (torch.float16, torch.bfloat16)
    dtype = next((d for d in (compute, weight.dtype) if d in half), torch.bfloat16)
    return Linear16(w, bias, dtype).train(weight.layer.training)


def _is(layer: nn.Module, name: str) -> bool:
    """A class of bitsandbytes by this name among the bases, without importing bitsandbytes."""
    return any(
        c.__name__ == name and c.__module__.startswith("bitsandbytes.") for c in type(layer).__mro__
    )
