# SPDX-License-Identifier: Apache-2.0
"""What the author of a method subclasses: one method on one layer.

The definition is ``merged``; ``forward`` is any cheaper path to the same map, and a law of the
tests holds the one to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastadapt.errors import ConfigError, UnsupportedError
from fastadapt.ops.low_rank_mixed import Pair

if TYPE_CHECKING:
    from fastadapt.base import Base
    from fastadapt.combine import Recipe
    from fastadapt.config import AdapterConfig
    from fastadapt.layer import AdaptedLayer

Part = nn.Module | nn.Parameter | Tensor


class Adapter:
    """A method on one layer.

    parts:  PEFT's parameter names -> modules or parameters; values: PEFT's plain per-adapter
    attributes (``scaling``, ``r``). ``build`` makes them; once attached, the AdaptedLayer owns
    both and ``self[name]`` looks them up there, so that FSDP, ``.to()`` and casts may replace
    them.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]
    Config: ClassVar[type[AdapterConfig]]
    identity_at_init: ClassVar[bool] = True
    takes_norms: ClassVar[bool] = False
    """Layers whose weight is a vector can be adapted."""
    keeps_dtype: ClassVar[bool] = False
    """Parts stay in the base's dtype, where others are widened to float32."""
    old_parts: ClassVar[dict[str, str | None]] = {}
    """Names that parts had in files of earlier PEFT releases -> their names now; None for what
    files no longer hold."""
    adds_embedding_to_file: ClassVar[bool] = True
    """On an embedding, files hold the embedding's own weight too."""
    converts: ClassVar[bool] = False
    """A LoRA of enough rank on the same linear layer can stand for the adapter."""
    must_agree: ClassVar[dict[str, str]] = {}
    """Fields that all adapters of the method on a model share -> how PEFT says so."""
    replaces_targets: ClassVar[bool] = False
    """``companions`` may stand in the place of adapters of its targets."""
    alias: ClassVar[str] = ""
    """PEFT's name of a wrapper of its own around the layer, under which scripts look for parts."""
    changes_base: bool = False
    """``start`` moves a part of the base's weight into the adapter: no other may stand on it."""
    constant: tuple[str, ...] = ()
    """Parts that never train: random projections, indices. ``build`` makes Parameters of them
    too; the layer holds them as buffers, which layers and adapters may share."""
    frozen: tuple[str, ...] = ()
    """Parts that do not train, and are parameters all the same (MiCA's B)."""

    def __init__(self, config: Any, base: Base, shared: Any = None) -> None:
        self.config = config
        self.parts: dict[str, Part] = {}
        self.values: dict[str, Any] = {}
        self._layer: AdaptedLayer | None = None
        self._key = ""
        self._held: dict[str, Any] = {}
        self.build(base, shared)

    @classmethod
    def over(cls, holder: Any, key: str) -> Self:
        """The method over parts and values that ``holder`` has already, under PEFT's names."""
        adapter = cls.__new__(cls)
        adapter.config, adapter.parts, adapter.values = None, {}, {}
        adapter._layer, adapter._key, adapter._held = holder, key, {}
        return adapter

    @classmethod
    def variant(cls, config: Any) -> type[Adapter]:
        """The class that serves ``config`` (a flag of the config may choose another)."""
        return cls

    @classmethod
    def tied(cls, config: Any, base: Base, source: Adapter) -> Adapter:
        """An adapter with the parameters of ``source``, whose layer has the transposed weight."""
        raise UnsupportedError(f"ensure_weight_tying: {cls.name} adapters cannot be shared")

    @classmethod
    def inside(cls, config: Any) -> tuple[type[Adapter], type[Adapter]]:
        """The classes that serve the input and the output projection of nn.MultiheadAttention,
        which multiplies by both itself."""
        raise UnsupportedError(f"{cls.name} does not adapt nn.MultiheadAttention; LoRA does")

    @classmethod
    def of_parameter(cls, config: Any) -> type[Adapter]:
        """The class that serves one parameter of a module (``target_parameters``)."""
        raise UnsupportedError(f"target_parameters: {cls.name} adapts layers, not parameters")

    @classmethod
    def companions(
        cls, config: Any, model: Any, adapters: dict[str, Any]
    ) -> dict[str, Callable[[Base], Adapter]]:
        """Further adapters that the configuration asks for, perhaps of another method, next to the
        ``adapters`` of its targets: path -> a maker."""
        return {}

    @classmethod
    def shared(cls, config: Any, bases: dict[str, Base]) -> Any:
        """What all layers of one adapter share, made once (a dict of Parameters, say); ``build``
        puts it among the parts of each layer, where it stays one tensor. None for most methods."""
        return None

    @classmethod
    def check_beside(cls, config: Any, others: dict[str, Any]) -> None:
        """Raise ConfigError for a new adapter that cannot be on a model with ``others`` of its
        method: adapter's name -> config."""
        for name, text in cls.must_agree.items():
            value = getattr(config, name)
            for held in (getattr(other, name) for other in others.values()):
                if held == value:
                    continue
                if isinstance(value, bool):
                    both = "[False, True]"
                    raise ConfigError(f"{text}, but got multiple different values: {both}")
                raise ConfigError(
                    f"{text}. Got config.{name}={value!r} but previous config had {held!r}."
                )

    def build(self, base: Base, shared: Any) -> None:
        """Fill ``parts`` and ``values`` from ``base.shape`` and the config."""
        raise NotImplementedError

    def start(self, base: Base) -> None:
        """Initial values that need the base's weight, once the parts are where they belong."""

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """THE DEFINITION: (W, bias) -> (W', bias'), in the layer's (out, in, *kernel) form."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """The adapted layer at x."""
        w, bias = self.merged(*base.read())
        y = base.apply(x, w.to(x.dtype if x.is_floating_point() else base.dtype))
        return y if bias is None else y + base.channels(bias).to(y.dtype)

    def low_rank_pair(self) -> Pair | None:
        """The pair of a method whose forward is ``base.low_rank`` of it and nothing else: rows of
        several such adapters share one product with the base. None for any other method."""
        return None

    def invocation(self) -> list[int] | None:
        """The tokens that a method waits for in each row of a batch, None for one that does not; it
        asks ``offsets`` in its forward how many tokens from the end of a row it acts on."""
        return None

    def offsets(self) -> list[int | None]:
        """How many of the last tokens of each row are the adapter's, None for a row that does not
        invoke it; of the rows that are its own in a mixed batch."""
        if self._layer is None or self._layer.offsets is None:
            return []
        found: list[int | None] = self._layer.offsets.get(self._key, [])
        return found if self._layer.group is None else [found[i] for i in self._layer.group]

    def file_key(self, part: str, leaf: str) -> str | None:
        """The key of a tensor in PEFT's file, below the layer's path: the part, and its leaf when
        the part is a module. "/name" is a key of the whole adapter (``base_model.name``); None is
        for what is not saved."""
        return f"{part}.{leaf}" if leaf else part

    def file_forms(self, part: str) -> dict[str, Callable[[Tensor], Tensor]]:
        """What files hold instead of a part, when that is not the part itself: suffix of its key
        -> function of the part's tensor."""
        return {}

    def from_file(self, part: str, forms: dict[str, Tensor]) -> Tensor:
        """The part's tensor again, from its forms by suffix."""
        raise NotImplementedError

    def rate(self, part: str) -> float:
        """p of the nn.Dropout that is called ``part``; 0 outside training."""
        module = self[part]
        return float(module.p) if isinstance(module, nn.Dropout) and module.training else 0.0

    @classmethod
    def penalty(cls, config: Any, adapters: dict[str, Any]) -> Tensor | None:
        """What the method adds to the model's loss; adapters: path -> those of one adapter's name.
        Asked only of methods that override it."""
        return None

    @classmethod
    def on_step(cls, config: Any, adapters: dict[str, Any], step: int) -> None:
        """After backward of step ``step``, for methods with a schedule (``update_and_allocate``);
        may change the config, which is saved."""

    @classmethod
    def combined_config(cls, configs: list[Any], recipe: Recipe) -> Any:
        """The configuration of a weighted combination of adapters of this method."""
        raise UnsupportedError(f"add_weighted_adapter: {cls.name} adapters cannot be combined")

    def combine(self, sources: list[tuple[Adapter, float]], recipe: Recipe, base: Base) -> None:
        """Take the values of the weighted combination of adapters of the same layer."""
        raise UnsupportedError(f"add_weighted_adapter: {self.name} adapters cannot be combined")

    def through(self, alias: str) -> Any:
        """The layer that has the parts that scripts look for under ``alias``."""
        return self._layer

    def attach(self, layer: AdaptedLayer, key: str) -> None:
        """From now on ``layer`` holds the parts, under the adapter's name ``key``."""
        self._layer, self._key = layer, key
        self.parts, self.values = {}, {}

    def hold(self, parts: dict[str, Any]) -> None:
        """Parts and values that a compiled forward reads from here: its guards must not name the
        adapter, or each one would be compiled anew."""
        self._held.update(parts)

    def __getitem__(self, name: str) -> Any:
        """A part or a value, by PEFT's name."""
        if self._layer is None:
            return self.parts[name] if name in self.parts else self.values[name]
        if torch.compiler.is_compiling() and name in self._held:
            return self._held[name]
        return getattr(self._layer, name)[self._key]


class DeltaAdapter(Adapter):
    """W' = W + delta(): most methods."""

    converts = True

    def delta(self) -> Tensor:
        raise NotImplementedError

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self.delta()
        return w.to(delta.dtype) + delta.to(w.device), bias
