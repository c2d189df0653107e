# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens:  W' = W with the rows of a few tokens replaced by D.

    W: (vocabulary, dim) of an embedding, or of the head that is tied to it;  D: (tokens, dim)

D starts as the rows of W. Neither path makes W' anew: the embedding is looked up in W and, where a
token is one of the few, in D; the head's logits of those tokens are x D^T (+ their bias).
LoRA's ``trainable_token_indices`` puts one of these on the embedding, next to its pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, FastAdaptWarning, TargetError, UnsupportedError
from fastadapt.targets import walk
from fastadapt.tying import input_embedding, tied_paths

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
    replaces_targets = True
    shares = False
    """D is another layer's."""

    @classmethod
    def companions(cls, config: Any, model: Any, adapters: dict[str, Any]) -> Companions:
        """What is tied to the embedding, most often the head."""
        first = adapters.get(input_embedding(model) or "")
        if first is None:
            return {}
        return dict.fromkeys(tied_with(model), lambda base: TiedTokens(config, base, first))

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
        if self.config.init_weights and not self.shares:
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
    alias = "token_adapter"


class TiedTokens(TrainableTokens):
    """Of a module whose weight is the embedding's, and whose rows are those of its adapter."""

    shares = True

    def __init__(self, config: Any, base: Base, source: Adapter) -> None:
        self.source = source
        super().__init__(config, base, source.parts[DELTA])

    def through(self, alias: str) -> Any:
        return self.source.through(alias)


class TiedTokenAdapter(TiedTokens):
    """The one under ``trainable_token_indices``, where PEFT's files have the rows once."""

    key = None
    alias = "token_adapter"


Companions = dict[str, Callable[[Base], Adapter]]


def companions_of(model: nn.Module, config: Any, cls: type[TrainableTokens]) -> Companions:
    """path -> a maker of the token adapter there: of each embedding named, or the model's, and of
    what is tied to it, unless that has tokens of its own.

    Raises TargetError for a name that no module has, ConfigError for tied modules with different
    tokens under ``ensure_weight_tying`` and for an embedding that is trained whole."""
    embedding, tied = input_embedding(model), tied_with(model)
    wanted = config.trainable_token_indices
    if not isinstance(wanted, dict):
        wanted = {embedding or "embed_tokens": list(wanted)}
    paths = [p for p, _ in walk(model)]
    places = {n: [p for p in paths if p == n or p.endswith(f".{n}")] for n in wanted}
    for name, tokens in wanted.items():
        if not places[name]:
            raise TargetError(
                f"trainable_token_indices: Target modules {{{name!r}}} not found in the base "
                "model. Please check the target modules and try again; no module is named so"
            )
        if name in (config.modules_to_save or ()):
            raise ConfigError(
                "The embedding layer is already marked to be trained fully, either specify "
                f"`modules_to_save=[..., '{name}', ...]` or `trainable_tokens={{'{name}': x}}` but "
                "not both."
            )
        check_tokens(tokens)
    shared = [n for n in wanted if {embedding, *tied} & set(places[n])] if tied else []
    differ = any(wanted[n] != wanted[shared[0]] for n in shared[1:])
    if differ and config.ensure_weight_tying:
        raise ConfigError(
            "Cannot ensure weight tying when different token indices are specified for tied "
            f"layers. Conflicting layers: {', '.join(f'{n}: {wanted[n]}' for n in shared)}. Please "
            "use the same indices for all tied layers or set ensure_weight_tying=False."
        )
    if config.ensure_weight_tying and not tied:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights "
            "(tie_word_embeddings=False). Weight tying will not be applied for "
            "trainable_token_indices.", FastAdaptWarning, stacklevel=5,
        )  # fmt: skip
    made: dict[str, Adapter] = {}
    found: Companions = {}
    for name, tokens in wanted.items():
        own = TrainableTokensConfig(token_indices=list(tokens))
        together = not differ and embedding in {p for n in shared for p in places[n]}
        for path in places[name]:
            if not (together and path in tied):
                found[path] = partial(_first, made, path, cls, own)
    if embedding in found and not differ:
        own = TrainableTokensConfig(token_indices=list(wanted[shared[0]] if shared else []))
        found.update({p: partial(_following, made, embedding, own) for p in tied})
    return found


def _first(
    made: dict[str, Adapter], path: str, cls: type[TrainableTokens], config: Any, base: Base
) -> Adapter:
    made[path] = cls(config, base)
    return made[path]


def _following(made: dict[str, Adapter], path: str, config: Any, base: Base) -> Adapter:
    return TiedTokenAdapter(config, base, made[path])


def tied_with(model: Any) -> list[str]:
    """The paths of what is tied to the input embedding: by what the model says, or else the head
    where its weight is the embedding's."""
    found = tied_paths(model)
    if found or getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return found
    tokens = input_embedding(model)
    try:
        output = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    head = next((p for p, m in walk(model) if m is output), None)
    if head is None or tokens is None or head == tokens:
        return []
    layers = [model.get_submodule(p) for p in (head, tokens)]
    own, other = (getattr(getattr(m, "base_layer", m), "weight", None) for m in layers)
    return [head] if own is other else []


def check_tokens(tokens: Any) -> None:
    """Different integers from 0 up."""
    if not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens):
        raise ConfigError(f"token indices: expected integers from 0 up, got {tokens!r:.80}")
    if len(set(tokens)) != len(tokens):
        raise ConfigError("token indices: a token is named twice")
