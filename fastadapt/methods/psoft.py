# SPDX-License-Identifier: Apache-2.0
"""PSOFT:  W' = W + s B (diag(b) R diag(a) - I) A,  R = (I + Q) (I - Q)^-1, Q skew-symmetric.

    A: (r, in * kernel)  B: (out, r), from W's largest singular values, frozen;  s = alpha / r
    weight: (r (r - 1) / 2,), the upper triangle of Q, or R itself (r, r);  a, b: (r,)

One low-rank product, whose second factor is B (R - I): only r numbers a token meet R.
Source: PSOFT (openreview.net/forum?id=FSHrinMArK).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError, FastAdaptWarning, UnsupportedError
from fastadapt.methods import fields
from fastadapt.methods.pair import PairAdapter, drop_part
from fastadapt.methods.projection import leading, size
from fastadapt.ops.rotate import cayley


@dataclass
class PsoftConfig(AdapterConfig):
    """PEFT's PsoftConfig.

    r: the rank; psoft_alpha: s = psoft_alpha / r; psoft_dropout: on the input of A; ab_svd_init:
    "psoft_init" (rows of A orthonormal) or "pissa_init" (the root of the singular values on both
    sides); psoft_svd: "full" or "lowrank", with psoft_svd_lowrank_niter power iterations from
    random_seed; psoft_orth: R is a rotation, else any matrix; psoft_mag_b, psoft_mag_a: vectors b
    and a; use_cayley_neumann, num_cayley_neumann_terms: a series instead of the inverse, with
    ||Q|| at most cayley_neumann_eps. ``fan_in_fan_out`` has no effect: layers know how they store
    W.
    """

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PSOFT  # type: ignore[attr-defined]
        fields.count(self, "r", "psoft_svd_lowrank_niter")
        fields.rate(self, "psoft_dropout")
        fields.choice(self, "ab_svd_init", ("psoft_init", "pissa_init"))
        fields.choice(self, "psoft_svd", ("full", "lowrank"))
        unused = {}
        if self.psoft_svd == "full":
            unused = {"psoft_svd_lowrank_niter": (10, "psoft_svd='lowrank'")}
        if not self.use_cayley_neumann:
            unused["num_cayley_neumann_terms"] = (5, "use_cayley_neumann=True")
            unused["cayley_neumann_eps"] = (None, "use_cayley_neumann=True")  # type: ignore[assignment]
        else:
            fields.count(self, "num_cayley_neumann_terms", needs="must be a positive integer; got")
            eps = self.cayley_neumann_eps
            if eps is not None and not 0 < eps < 1:
                raise ConfigError(f"`cayley_neumann_eps` must be in (0, 1) when set; got {eps}.")
        for name, (default, needs) in unused.items():
            if getattr(self, name) != default:
                warnings.warn(
                    f"`{name}` is only used when `{needs}`. {name}={getattr(self, name)} will be "
                    "ignored.",
                    FastAdaptWarning, stacklevel=4,
                )  # fmt: skip

    @property
    def scaling(self) -> float:
        """s."""
        return self.psoft_alpha / self.r


class Rotation(nn.Module):
    """``weight``, ``vector_b`` and ``vector_a``, where PEFT has them."""

    def __init__(self, config: PsoftConfig) -> None:
        super().__init__()
        r, start = config.r, config.init_weights
        if config.psoft_orth:
            self.weight = nn.Parameter(torch.zeros(r * (r - 1) // 2))
            if not start:
                nn.init.normal_(self.weight, std=0.1)
        else:
            whole = torch.eye(r)
            self.weight = nn.Parameter(whole if start else whole + torch.randn(r, r) * 0.1)
        self.vector_b = nn.Parameter(torch.ones(r)) if config.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r)) if config.psoft_mag_a else None


class Psoft(PairAdapter):
    converts = True
    name, prefix, Config = "psoft", "psoft_", PsoftConfig
    constant = ("_psoft_A_cache", "_psoft_B_cache")
    dropout = "psoft_dropout"

    def build(self, base: Base, shared: Any) -> None:
        config: PsoftConfig = self.config
        out, inner = size(base.shape)
        if config.r > min(out, inner):
            raise UnsupportedError(
                f"`r` ({config.r}) must be less than or equal to min(in_features, out_features) "
                f"({inner}, {out}): an embedding or convolution this narrow has no more directions"
            )
        self.parts = {
            "psoft_dropout": drop_part(config.psoft_dropout), "psoft_R": Rotation(config),
            "_psoft_A_cache": nn.Parameter(torch.zeros(config.r, inner), requires_grad=False),
            "_psoft_B_cache": nn.Parameter(torch.zeros(out, config.r), requires_grad=False),
        }  # fmt: skip
        self.values = {"r": config.r, "psoft_alpha": config.psoft_alpha,
                       "scaling": config.scaling}  # fmt: skip
        # the start values of a free R are the identity plus noise
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def start(self, base: Base) -> None:
        config, a, b = self.config, self["_psoft_A_cache"], self["_psoft_B_cache"]
        if a.is_meta:
            return
        seed = config.random_seed if config.psoft_svd == "lowrank" else None
        u, s, v = leading(base.read()[0], config.r, seed, config.psoft_svd_lowrank_niter)
        s = s / self["scaling"]
        with torch.no_grad():
            if config.ab_svd_init == "psoft_init":
                a.copy_(v)
                b.copy_(u * s)
            else:
                a.copy_(s.sqrt()[:, None] * v)
                b.copy_(u * s.sqrt())

    def file_key(self, part: str, leaf: str) -> str | None:
        return None if part in self.constant else super().file_key(part, leaf)

    @property
    def scale(self) -> float:  # type: ignore[override]
        return float(self["scaling"])

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self["_psoft_A_cache"], self["_psoft_B_cache"] @ self._turn()

    def _turn(self) -> Tensor:
        """diag(b) R diag(a) - I."""
        held, config = self["psoft_R"], self.config
        eye = torch.eye(config.r, dtype=held.weight.dtype, device=held.weight.device)
        turn = held.weight - eye if not config.psoft_orth else self._cayley(held.weight)
        if held.vector_b is None and held.vector_a is None:
            return turn
        r = turn + eye
        r = r if held.vector_b is None else held.vector_b[:, None] * r
        r = r if held.vector_a is None else r * held.vector_a
        return r - eye

    def _cayley(self, upper: Tensor) -> Tensor:
        config = self.config
        rows, columns = torch.triu_indices(config.r, config.r, 1, device=upper.device)
        wide = upper.float() if upper.dtype in (torch.float16, torch.bfloat16) else upper
        q = wide.new_zeros(config.r, config.r).index_put((rows, columns), wide)
        q = q - q.t()
        if not config.use_cayley_neumann:
            return cayley(-q[None])[0].to(upper.dtype)
        eps = config.cayley_neumann_eps
        if eps is not None:
            norm = torch.linalg.norm(q)
            q = q * torch.where(norm > eps, eps / (norm + 1e-12), 1.0)
        return cayley(q[None], config.num_cayley_neumann_terms)[0].to(upper.dtype)
