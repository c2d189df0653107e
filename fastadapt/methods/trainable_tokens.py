# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens:  W' = W with the rows of a few tokens replaced by D.

    W: (vocabulary, dim) of an embedding, or of the head that is tied to it;  D: (tokens, dim)

D starts as the rows of W. Neither path makes W' anew: the embedding is looked up in W and, where a
token is one of the few, in D; the head's logits of those tokens are x D^T (+ their bias).
LoRA's ``trainable_token_indices`` puts one of these on the embedding, next to its pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, TargetError, UnsupportedError
from fastadapt.targets import walk

if TYPE_CHECKING:
    from fastadapt.layer import AdaptedLayer

DELTA = "trainable_tokens_delta"


@dataclass
class TrainableTokensConfig(AdapterConfig):
    """token_indices: the tokens; target_modules: embeddings, by default the model's input
    embedding; init_weights: False starts them at N(0, 1)."""

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    without: ClassVar = ("exclude_modules", "modules_to_save", "layers_to_transform",
                         "layers_pattern")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS  # type: ignore[attr-defined]
        self.token_indices = list(self.token_indices)
        check_tokens(self.token_indices)

    def default_targets_in(self, model: nn.Module) -> list[str] | str:
        path = input_embedding(model)
        return [path or "embed_tokens"]


class TrainableTokens(Adapter):
    name, prefix, Config = "trainable_tokens", "trainable_tokens_", TrainableTokensConfig
    adds_embedding_to_file = False
    key: str | None = DELTA
    """In files; None for what files do not hold."""
    tied = False
    """D is another layer's."""

    @classmethod
    def companions(cls, config: Any, model: Any, adapters: dict[str, Any]) -> Companions:
        """A head that is tied to the embedding."""
        head, first = tied_head(model), adapters.get(input_embedding(model) or "")
        if head is None or first is None:
            return {}
        return {head: lambda base: TiedTokens(config, base, first.parts[DELTA])}

    def build(self, base: Base, shared: Any) -> None:
        if len(base.shape) != 2:
            raise UnsupportedError("trainable tokens on a convolution: it has no rows for tokens")
        self.axis = 1 if base.indexed else 0
        tokens: list[int] = self.config.token_indices
        if not tokens:
            raise ConfigError("token_indices: expected at least one token, got none")
        count, dim = base.shape[self.axis], base.shape[1 - self.axis]
        if not 0 <= min(tokens) <= max(tokens) < count:
            raise ConfigError(f"token_indices: expected 0 to {count - 1}, got {tokens[:8]}")
        self._rows: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        fresh = torch.zeros if self.config.init_weights else torch.randn
        self.parts = {DELTA: nn.Parameter(fresh(len(tokens), dim)) if shared is None else shared}
        self.values = {"token_indices": tokens}

    def start(self, base: Base) -> None:
        if self.config.init_weights and not self.tied:
            w = base.read()[0]
            rows = w.index_select(self.axis, torch.tensor(self["token_indices"], device=w.device))
            with torch.no_grad():
                self[DELTA].copy_(rows.t() if self.axis else rows)

    def file_key(self, part: str, leaf: str) -> str | None:
        return self.key

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        d = self[DELTA]
        w = w.to(torch.promote_types(w.dtype, d.dtype))
        d = (d.t() if self.axis else d).to(w)
        return w.index_copy(self.axis, self._index(w.device)[0], d), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, d = base(x), self[DELTA]
        tokens, ordered, order = self._index(y.device)
        if not self.axis:
            logits = base.apply(x, d.to(x.dtype))
            bias = base.bias
            if bias is not None:
                logits = logits + bias[tokens]
            return y.index_copy(-1, tokens, logits.to(y.dtype))
        place = torch.searchsorted(ordered, x).clamp_max(len(ordered) - 1)
        rows = base.apply(order[place], d.t())
        return torch.where((ordered[place] == x).unsqueeze(-1), rows.to(y.dtype), y)

    def _index(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, tokens in order, which of them each is)."""
        if device not in self._rows:
            tokens = torch.tensor(self["token_indices"], device=device)
            self._rows[device] = (tokens, *tokens.sort())
        return self._rows[device]


class TokenAdapter(TrainableTokens):
    """The one of LoRA's ``trainable_token_indices``."""

    key = f"token_adapter.{DELTA}"

    def attach(self, layer: AdaptedLayer, key: str) -> None:
        super().attach(layer, key)
        # PEFT has a module of this name inside, here the layer is it
        vars(layer)["token_adapter"] = layer


class TiedTokens(TrainableTokens):
    """The head's, whose rows are those of the embedding that it is tied to."""

    tied = True


class TiedTokenAdapter(TiedTokens):
    """The head's under ``trainable_token_indices``, where PEFT's files have the rows once."""

    key = None


Companions = dict[str, Callable[[Base], Adapter]]


def companions_of(
    model: nn.Module, wanted: list[int] | dict[str, list[int]], cls: type[TrainableTokens]
) -> Companions:
    """path -> a maker of the token adapter there: of each embedding named, or the model's, and of
    the head that is tied to it. Raises TargetError for a name that no module has."""
    embedding = input_embedding(model)
    if not isinstance(wanted, dict):
        wanted = {embedding or "embed_tokens": list(wanted)}
    paths = [p for p, _ in walk(model)]
    found: Companions = {}
    for name, tokens in wanted.items():
        chosen = [p for p in paths if p == name or p.endswith(f".{name}")]
        if not chosen:
            raise TargetError(f"trainable_token_indices: no module is named {name!r}")
        check_tokens(tokens)
        config = TrainableTokensConfig(token_indices=list(tokens))
        for path in chosen:
            found.update(_tied(model, path, path == embedding, config, cls))
    return found


def _tied(
    model: nn.Module, path: str, is_input: bool, config: Any, cls: type[TrainableTokens]
) -> Companions:
    made: dict[str, Adapter] = {}

    def first(base: Base) -> Adapter:
        made[path] = cls(config, base)
        return made[path]

    head = tied_head(model) if is_input else None
    if head is None:
        return {path: first}
    return {path: first, head: lambda base: TiedTokenAdapter(config, base, made[path].parts[DELTA])}


def input_embedding(model: Any) -> str | None:
    """The path of the input embedding, where the model says it."""
    return _path(model, "get_input_embeddings")


def tied_head(model: Any) -> str | None:
    """The path of the output head, when its weight is the input embedding's."""
    head, tokens = _path(model, "get_output_embeddings"), input_embedding(model)
    if head is None or tokens is None or head == tokens:
        return None
    layers = [model.get_submodule(p) for p in (head, tokens)]
    own, other = (getattr(getattr(m, "base_layer", m), "weight", None) for m in layers)
    return head if own is other else None


def _path(model: Any, ask: str) -> str | None:
    try:
        found = getattr(model, ask)()
    except (AttributeError, NotImplementedError):
        return None
    return next((p for p, m in walk(model) if m is found), None)


def check_tokens(tokens: Any) -> None:
    """Different integers from 0 up."""
    if not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens):
        raise ConfigError(f"token indices: expected integers from 0 up, got {tokens!r:.80}")
    if len(set(tokens)) != len(tokens):
        raise ConfigError("token indices: a token is named twice")
