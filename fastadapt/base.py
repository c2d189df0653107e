# SPDX-License-Identifier: Apache-2.0
"""A frozen layer as an affine map: all that an adapter may see.

``FrozenLayer`` is the bottom, a real layer; ``Stacked`` is an adapter on a base, and is a base.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastadapt.errors import UnsupportedError
from fastadapt.kinds import kind_of
from fastadapt.ops.bits import Bits, Dense
from fastadapt.ops.dropout import dropout
from fastadapt.ops.low_rank import low_rank
from fastadapt.ops.low_rank_mixed import Pair, low_rank_mixed
from fastadapt.ops.precision import compute_dtype
from fastadapt.ops.row_norm import row_norm
from fastadapt.weights import format_of

if TYPE_CHECKING:
    from fastadapt.adapter import Adapter

Parts = tuple[nn.Module | nn.Parameter, nn.Module | nn.Parameter]


class Base(Protocol):
    """W is (out, in, *kernel) = ``shape``, whatever the layer stores."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def indexed(self) -> bool:
        """The input holds indices of input channels (an embedding)."""

    @property
    def groups(self) -> int:
        """The input has ``shape[1] * groups`` channels (1 but for grouped convolutions)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's weight, decoded: what a lookup by indices gives."""

    @property
    def whole(self) -> bool:
        """Calling it is ``apply(x, w) + bias`` of what ``read`` gives, and reading is free."""

    @property
    def bias(self) -> Tensor | None: ...
    def __call__(self, x: Tensor) -> Tensor: ...
    def read(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias), dequantised."""

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        """This layer's op with another weight, no bias."""

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        """w: (out, r) over the channels of h."""

    def channels(self, v: Tensor) -> Tensor:
        """v: (out,) shaped to scale or shift the output."""

    def inputs(self, v: Tensor) -> Tensor:
        """v: (channels of the input,) shaped to scale the input."""

    def pair(self, r: int, bias: bool = False) -> Parts:
        """Fresh maps in -> r and r -> out."""

    def orient(self, w: Tensor) -> Tensor:
        """A weight as the layer stores it, in the form (out, in, *kernel), or back."""

    def copy(self) -> nn.Module:
        """The layer itself once more, to be trained; raises UnsupportedError when quantised."""

    def store(self, w: Tensor) -> None:
        """Keep w instead of the weight, for good; a start that moves a part of it elsewhere."""

    def note(self, name: str, forget: bool = False) -> Any:
        """What a preprocessing pass left on the layer under this name, or None."""

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout on an input; indices pass as they are."""

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0) -> Tensor:
        """self(x) + scale b a drop(x), fused where the bits allow."""

    def row_norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """|| W + scale b a || of each output row, a constant: (out,)."""


class FrozenLayer:
    """A layer of the model, by its kind and its weight's format."""

    def __init__(self, layer: nn.Module) -> None:
        kind, weight = kind_of(layer), format_of(layer)
        if kind is None or weight is None:
            raise UnsupportedError(
                f"expected a layer of a supported kind (linear, GPT-2 Conv1D, embedding) with a "
                f"dense, 4-bit or int8 bitsandbytes weight, got {type(layer).__module__}."
                f"{type(layer).__name__}"
            )
        self.layer, self.kind, self.weight = layer, kind, weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kind.shape

    @property
    def indexed(self) -> bool:
        return self.kind.indexed

    @property
    def groups(self) -> int:
        return self.kind.groups

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def whole(self) -> bool:
        return self.why_not_fused() is None and isinstance(self.weight.bits(), Dense)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.layer, "bias", None)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.layer(x, *args, **kwargs)
        return y

    def read(self) -> tuple[Tensor, Tensor | None]:
        return self.kind.orient(self.weight.read()), self.bias

    def write(self, w: Tensor, bias: Tensor | None, *, refit: bool = False) -> None:
        """Store a merged weight (and bias, when there is one) in new tensors; ``refit``: in codes
        that keep what w changes."""
        if bias is not None and not hasattr(self.layer, "bias"):
            raise UnsupportedError(f"a {self.kind.name} layer has no bias to merge into")
        (self.weight.refit if refit else self.weight.write)(self.kind.orient(w))
        if bias is not None:
            old = self.bias
            dtype = self.weight.dtype if old is None else old.dtype
            self.layer.bias = nn.Parameter(
                bias.detach().to(dtype).clone(), requires_grad=old is not None and old.requires_grad
            )

    def in_16_bit(self, w: Tensor, bias: Tensor | None) -> nn.Module | None:
        """A layer with this weight unquantised; None where the layer is not quantised."""
        return self.weight.in_16_bit(self.kind.orient(w), bias)

    def snapshot(self) -> tuple[tuple[Any, ...], Tensor | None]:
        """The stored tensors as they are; ``write`` leaves them alone."""
        return self.weight.snapshot(), self.bias

    def restore(self, held: tuple[tuple[Any, ...], Tensor | None]) -> None:
        """Put a snapshot back, to the bit."""
        weight, bias = held
        self.weight.restore(weight)
        if hasattr(self.layer, "bias"):
            self.layer.bias = bias  # type: ignore[assignment]

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        return self.kind.apply(x, w)

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        return self.kind.mix(h, w)

    def channels(self, v: Tensor) -> Tensor:
        return self.kind.channels(v)

    def inputs(self, v: Tensor) -> Tensor:
        return self.kind.inputs(v)

    def pair(self, r: int, bias: bool = False) -> Parts:
        return self.kind.pair(r, bias)

    def orient(self, w: Tensor) -> Tensor:
        return self.kind.orient(w)

    def copy(self) -> nn.Module:
        if not isinstance(self.weight.bits(), Dense):
            raise UnsupportedError(
                f"a {self.weight.name} layer cannot be trained whole: its weight is quantised"
            )
        # on the device that new tensors get: "meta" while a file is only checked
        made: nn.Module = copy.deepcopy(self.layer)
        return made.to(torch.empty(0).device)

    def store(self, w: Tensor) -> None:
        self.write(w, None)

    def note(self, name: str, forget: bool = False) -> Any:
        if forget:
            return self.layer.__dict__.pop(name, None)
        return self.layer.__dict__.get(name)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x if self.indexed or p == 0 else dropout(x, p)

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0) -> Tensor:
        bits = None if self._why_called() else self.bits()
        if bits is None:
            return _added(self, x, a, b, scale, p)
        return low_rank(
            x, a, b, scale, bits=bits, bias=self.bias, p=p,
            compute=self.weight.compute(x), out=compute_dtype(x),
        )  # fmt: skip

    def low_rank_mixed(self, x: Tensor, pairs: Sequence[Pair], index: Sequence[int]) -> Tensor:
        """Row i of the batch through the layer and ``pairs[index[i]]``, the layer's own product
        once; for a layer whose weight is a matrix over the last channel of x."""
        more: dict[str, Any] = {"n": self.shape[0], "out": compute_dtype(x)}
        if self.why_not_fused() is None:
            more |= {"bits": self.bits(), "bias": self.bias, "compute": self.weight.compute(x)}
            return low_rank_mixed(x, pairs, index, **more)
        y = self(x)
        return y + low_rank_mixed(x, pairs, index, compute=more["out"], **more).to(y.dtype)

    def row_norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        bits = self.bits()
        if bits is None or isinstance(bits, Dense):
            return _norm(self.read()[0], a, b, scale)
        return row_norm(bits, a, b, scale)

    def why_not_fused(self) -> str | None:
        """Why the layer itself must be called instead of an op over its bits."""
        reason = self._why_called()
        if reason is None and self.weight.bits() is None:
            return f"{self.weight.name}: the layer quantises its input and must multiply itself"
        return reason

    def _why_called(self) -> str | None:
        """The same, but for the weight's format: asked at every call."""
        layer = self.layer
        if not self.kind.product:
            return f"a {self.kind.name} layer is not a matrix product"
        if "forward" in layer.__dict__ or "_hf_hook" in layer.__dict__:
            return "the layer's forward was replaced (offload hook, tensor parallel)"
        if layer._forward_hooks or layer._forward_pre_hooks:
            return "the layer has forward hooks"
        if not self.kind.stock_forward:
            return f"{type(layer).__name__} has a forward of its own"
        if layer.weight.requires_grad:
            return "the base weight is trained"
        return None

    def bits(self) -> Bits | None:
        bits = self.weight.bits()
        if isinstance(bits, Dense):
            return bits._replace(w=self.kind.orient(bits.w))
        return bits


def hold_weights(root: nn.Module) -> None:
    """Ready every layer's weight for training, also of layers without an adapter: gradients pass
    through them."""
    for module in root.modules():
        weight = format_of(module)
        if weight is not None:
            weight.attach()


def release_weights(root: nn.Module) -> None:
    """Undo ``hold_weights``."""
    for module in root.modules():
        weight = format_of(module)
        if weight is not None:
            weight.detach()


class Stacked:
    """``adapter`` on ``base``: another base."""

    def __init__(self, adapter: Adapter, base: Base) -> None:
        self.adapter, self.base = adapter, base

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def indexed(self) -> bool:
        return self.base.indexed

    @property
    def groups(self) -> int:
        return self.base.groups

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def whole(self) -> bool:
        return False

    @property
    def bias(self) -> Tensor | None:
        return self.read()[1]

    def __call__(self, x: Tensor) -> Tensor:
        return self.adapter.forward(x, self.base)

    def read(self) -> tuple[Tensor, Tensor | None]:
        return self.adapter.merged(*self.base.read())

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        return self.base.apply(x, w)

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        return self.base.mix(h, w)

    def channels(self, v: Tensor) -> Tensor:
        return self.base.channels(v)

    def inputs(self, v: Tensor) -> Tensor:
        return self.base.inputs(v)

    def pair(self, r: int, bias: bool = False) -> Parts:
        return self.base.pair(r, bias)

    def orient(self, w: Tensor) -> Tensor:
        return self.base.orient(w)

    def copy(self) -> nn.Module:
        return self.base.copy()

    def store(self, w: Tensor) -> None:
        self.base.store(w)

    def note(self, name: str, forget: bool = False) -> Any:
        return self.base.note(name, forget)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return self.base.drop(x, p)

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0) -> Tensor:
        return _added(self, x, a, b, scale, p)

    def row_norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return _norm(self.read()[0], a, b, scale)


class Called:
    """A base whose layer is called with further arguments, for layers that take more than x."""

    def __init__(self, base: FrozenLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._base, self._args, self._kwargs = base, args, kwargs

    def __call__(self, x: Tensor) -> Tensor:
        return self._base(x, *self._args, **self._kwargs)

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0) -> Tensor:
        return _added(self, x, a, b, scale, p)

    @property
    def whole(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _added(base: Base, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    """base(x) + scale b a drop(x): the base is called, the low-rank part added."""
    y = base(x)
    if not base.indexed and len(base.shape) == 2:
        kind = compute_dtype(x)
        return y + low_rank(x, a, b, scale, p=p, compute=kind, out=kind).to(y.dtype)
    x = base.drop(x, p)
    if x.is_floating_point():
        x = x.to(a.dtype)
    return y + (base.mix(base.apply(x, a), b) * scale).to(y.dtype)


def _norm(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return row_norm(Dense(w.detach().flatten(1)), a.flatten(1), b.flatten(1), scale)


def compose(a: Tensor, b: Tensor) -> Tensor:
    """b a as one weight: a (r, in, *kernel), b (out, r, ...) -> (out, in, *kernel)."""
    return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])
