# SPDX-License-Identifier: Apache-2.0
"""OSF:  W' = W + U diag(s) V - U0 diag(s0) V0,  U0 s0 V0 the smallest singular triplets of W.

    U: (out, q)  s: (q,)  V: (q, in * kernel)   q = min(out, in) - effective_rank, half by default

The gradients of U and V are projected away from the large singular vectors, which stay as they
are. One product of rank 2 q over the activations; at its default q it costs as much as the layer
itself twice over, which is the floor of a method that trains half of the spectrum.
Source: OSF (arXiv 2504.07097).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods.pair import PairAdapter
from fastadapt.methods.projection import size
from fastadapt.targets import ALL_LINEAR, matches_within, model_type

_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
_BY_TARGET: tuple[tuple[list[str], str], ...] = (
    (_LLAMA, "llama llama4 mistral mixtral gemma gemma2 gemma3_text phi qwen2 qwen3"),
    (["c_attn", "c_proj"], "gpt2 gpt_bigcode"),
    (["query_key_value", "dense_4h_to_h"], "bloom falcon gpt_neox"),
    (["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"], "gptj"),
    (["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "opt"),
)
_TARGETS: dict[str, list[str] | str] = {
    model: names for names, models in _BY_TARGET for model in models.split()
}


@dataclass
class OSFConfig(AdapterConfig):
    """PEFT's OSFConfig.

    effective_rank: singular directions that are kept; a float in (0, 1] is a share of the smaller
    side, None is half of it; rank_pattern: pattern -> effective_rank; init_weights: False starts
    at random; target_svd_config: accepted and ignored, as in PEFT.
    """

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None

    without = ("exclude_modules", "layers_to_transform", "layers_pattern")
    default_targets = _TARGETS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.OSF  # type: ignore[attr-defined]
        for rank in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if rank is not None and not 0 < rank < 1 << 28:
                raise ConfigError(
                    "`effective_rank` should be a positive integer value but the value passed is "
                    f"{rank}"
                )

    def default_targets_in(self, model: Any) -> list[str] | str:
        """All linear layers where the model's type has no default."""
        known = model_type(model) in self.default_targets
        return super().default_targets_in(model) if known else ALL_LINEAR

    def at(self, path: str) -> OSFConfig:
        """A pattern may match anywhere in the path."""
        for pattern, rank in (self.rank_pattern or {}).items():
            if matches_within(pattern, path):
                made = copy.copy(self)
                made.effective_rank = rank
                return made
        return self


class Osf(PairAdapter):
    name, prefix, Config = "osf", "osf_", OSFConfig
    constant = ("_osf_U_low_init", "_osf_S_low_init", "_osf_V_low_init", "_osf_U_high",
                "_osf_V_high")  # fmt: skip

    def build(self, base: Base, shared: Any) -> None:
        config: OSFConfig = self.config
        n, k = size(base.shape)
        least, rank = min(n, k), config.effective_rank
        if rank is None:
            high = least // 2
        else:
            high = int(least * rank) if isinstance(rank, float) and rank <= 1 else int(rank)
        high = min(least, high)
        if high <= 0:
            raise ConfigError(
                "`effective_rank` should be a positive integer value but the value passed is "
                f"{high}, of a layer with {least} directions"
            )
        sizes = {"U": (n, least - high), "S": (least - high,), "V": (least - high, k)}
        low = {f"{p}_low": torch.zeros(s) for p, s in sizes.items()}
        held = {f"_osf_{p}_low_init": torch.zeros(s) for p, s in sizes.items()}
        # the projection away from the large vectors is U0 U0^T where all of them span the space
        if n > k:
            held["_osf_U_high"] = torch.zeros(n, high)
        if k > n:
            held["_osf_V_high"] = torch.zeros(high, k)
        self.parts = {
            "osf_svd_params": nn.ParameterDict({p: nn.Parameter(t) for p, t in low.items()}),
            **{p: nn.Parameter(t, requires_grad=False) for p, t in held.items()},
        }
        self.values = {"effective_rank": high}
        self.identity_at_init = config.init_weights is not False  # type: ignore[misc]

    def start(self, base: Base) -> None:
        trained, high = self["osf_svd_params"], self["effective_rank"]
        if trained["S_low"].is_meta:
            return
        flat = base.read()[0].detach().flatten(1).float()
        u, s, v = torch.linalg.svd(flat, full_matrices=False)
        with torch.no_grad():
            for name, whole in (("U", u[:, high:]), ("S", s[high:]), ("V", v[high:])):
                self[f"_osf_{name}_low_init"].copy_(whole)
                if self.config.init_weights is False:
                    trained[f"{name}_low"].copy_(torch.randn(whole.shape))
                else:
                    trained[f"{name}_low"].copy_(whole)
            if len(u) > flat.shape[1]:
                self["_osf_U_high"].copy_(u[:, :high])
            if len(u) < flat.shape[1]:
                self["_osf_V_high"].copy_(v[:high])

    def file_key(self, part: str, leaf: str) -> str | None:
        return None if part in self.constant else super().file_key(part, leaf)

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        trained = self["osf_svd_params"]
        u0, s0, v0 = (self[f"_osf_{name}_low_init"] for name in "USV")
        n, k = size(shape)
        tall, flat = n > k, n < k
        u = Projected.apply(trained["U_low"], self["_osf_U_high"] if tall else u0, tall)  # type: ignore[no-untyped-call]
        v = trained["V_low"].t()
        across = self["_osf_V_high"] if flat else v0
        v = Projected.apply(v, across.t(), flat).t()  # type: ignore[no-untyped-call]
        return torch.cat([v, v0]), torch.cat([u * trained["S_low"], -u0 * s0], 1)


class Projected(torch.autograd.Function):
    """t itself; its gradient without (``away``) or within the span of the columns of h."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, h: Tensor, away: bool) -> Tensor:
        ctx.save_for_backward(h)
        ctx.away = away
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (h,) = ctx.saved_tensors
        h = h.to(g.dtype)
        inside = h @ (h.t() @ g)
        return g - inside if ctx.away else inside, None, None
