# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA:  W' = W + B A,  A and B cut into pieces of v numbers, each a mixture of shared vectors.

    piece = sum over the k largest logits of softmax(logit) vector
    bank: (h, v), one for all layers  logits_A: (r, in * kernel / v, h)  logits_B: (out / v, r, h)

The mixture is a product with a matrix that has k non-zeros a row, so that the bank's gradient is a
product too, not a sorted scatter.
Source: VB-LoRA (arXiv 2405.15179).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, LifecycleError, UnsupportedError
from fastadapt.methods import fields
from fastadapt.methods.pair import PairAdapter, drop_part
from fastadapt.methods.projection import near, size
from fastadapt.targets import DEFAULT_TARGETS

_OPT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@dataclass
class VBLoRAConfig(AdapterConfig):
    """PEFT's VBLoRAConfig.

    r: the rank; num_vectors, vector_length: the bank, whose vector length divides both sizes of
    each layer; topk: vectors in a mixture; save_only_topk_weights: files hold the choice and its
    weights, not the logits (such an adapter cannot be trained on); vblora_dropout: on the input;
    bias: "none", "all" or "vblora_only"; init_vector_bank_bound, init_logits_std: of the start
    values. ``fan_in_fan_out`` has no effect: layers know how they store W.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    default_targets = {  # noqa: RUF012
        **DEFAULT_TARGETS,
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "bart": _OPT,
        "opt": _OPT,
        "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VBLORA  # type: ignore[attr-defined]
        fields.count(self, "r", "num_vectors", "vector_length", "topk")
        fields.rate(self, "vblora_dropout")
        fields.choice(self, "bias", ("none", "all", "vblora_only"))
        if self.topk > self.num_vectors:
            raise ConfigError(f"topk: expected at most num_vectors={self.num_vectors}")


class VBLoRA(PairAdapter):
    converts = True
    name, prefix, Config = "vblora", "vblora_", VBLoRAConfig
    identity_at_init = False
    dropout = "vblora_dropout"
    _chosen = False

    @classmethod
    def shared(cls, config: VBLoRAConfig, bases: dict[str, Base]) -> nn.Parameter:
        return nn.Parameter(torch.zeros(config.num_vectors, config.vector_length))

    def build(self, base: Base, shared: nn.Parameter) -> None:
        config: VBLoRAConfig = self.config
        (out, inner), length = size(base.shape), config.vector_length
        for what, n in (("in_features", inner), ("out_features", out)):
            if n % length:
                raise UnsupportedError(
                    f"`{what}` {n} must be divisible by `vector_length` {length}: choose a length "
                    "that divides the sizes of all targets"
                )
        a = nn.Parameter(torch.empty(config.r, inner // length, config.num_vectors))
        b = nn.Parameter(torch.empty(out // length, config.r, config.num_vectors))
        # PEFT draws the bank again for each layer; the last draw stands
        bound = config.init_vector_bank_bound
        nn.init.uniform_(shared, -bound, bound)
        nn.init.normal_(a, 0, config.init_logits_std)
        nn.init.normal_(b, 0, config.init_logits_std)
        self.parts = {
            "vblora_dropout": drop_part(config.vblora_dropout), "vblora_logits_A": a,
            "vblora_logits_B": b, "vblora_vector_bank": shared,
        }  # fmt: skip
        self.values = {"r": config.r, "topk": config.topk}

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        a, b = self._mixture("vblora_logits_A"), self._mixture("vblora_logits_B")
        return a.flatten(1), b.transpose(1, 2).reshape(-1, b.shape[1])

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self._chosen and torch.is_grad_enabled() and self["vblora_logits_A"].requires_grad:
            raise LifecycleError(
                "Found infinity values in VB-LoRA logits. Ensure training was not resumed from a "
                "`save_only_topk_weights` model."
            )
        return super().forward(x, base)

    def _mixture(self, part: str) -> Tensor:
        """(..., h) logits -> (..., v)."""
        logits: Tensor = self[part]
        top, places = logits.topk(self["topk"], dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, places, top.softmax(-1))
        return weights @ near(self["vblora_vector_bank"], logits)

    def file_key(self, part: str, leaf: str) -> str | None:
        return f"/{part}" if part == "vblora_vector_bank" else super().file_key(part, leaf)

    def file_forms(self, part: str) -> dict[str, Callable[[Tensor], Tensor]]:
        if not self.config.save_only_topk_weights or part == "vblora_vector_bank":
            return {}
        k, h = self.config.topk, self.config.num_vectors
        small = next(d for d, bits in _INDEX.items() if h < 2**bits)
        return {
            "_topk_indices": lambda t: t.topk(k).indices.to(small),
            "_topk_weights": lambda t: t.topk(k).values.softmax(-1)[..., :-1].contiguous(),
        }

    def from_file(self, part: str, forms: dict[str, Tensor]) -> Tensor:
        self._chosen = True
        weights = forms["_topk_weights"]
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        logits = torch.full((*weights.shape[:-1], self.config.num_vectors), -torch.inf)
        return logits.scatter(-1, forms["_topk_indices"].long(), weights.log())


_INDEX = {torch.uint8: 8, torch.int16: 15, torch.int32: 31, torch.int64: 63}
"""dtype of saved indices -> bits that it has for them."""
