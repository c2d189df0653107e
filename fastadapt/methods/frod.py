# SPDX-License-Identifier: Apache-2.0
"""FRoD:  W' = W + U (S + diag(l - l0)) V^T,  W = U diag(l0) V^T; S sparse, V one for all layers of
a kind ("self_attn_q_proj").

    V: (in, in), from all weights of the kind  U: (out, in)  S: share of the entries off the
    diagonal, at places that are drawn once  l: (in,)

U and V are dense and frozen, and V V^T is not the identity, so nothing shorter gives the same map:
products with V, with S and its diagonal (dense, in x in) and with U, beside the base's. PEFT puts
U (S + diag l) V^T in place of W, without the base's product; there W is lost to the rounding of U
and V, and the start is no identity in half precision.
Source: FRoD (doi.org/10.1609/aaai.v40i31.39813).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastadapt.adapter import Adapter
from fastadapt.base import Base
from fastadapt.config import AdapterConfig, PeftType
from fastadapt.errors import ConfigError
from fastadapt.methods import fields
from fastadapt.methods.pair import drop_part
from fastadapt.methods.projection import generator, near, size
from fastadapt.ops.precision import compute_dtype
from fastadapt.targets import DEFAULT_TARGETS


@dataclass
class FrodConfig(AdapterConfig):
    """PEFT's FrodConfig.

    projection_prng_key: seed of the places of S; save_projection: files hold V and the places;
    frod_dropout: on the update's input; bias: "none", "all" or "frod_only"; sparse_rate: share of
    the entries of S; regularization_alpha: ridge in V's making; init_weights: False starts at
    random. ``progressbar`` and ``runtime_offload_base_weight`` have no effect: nothing is slow
    enough to be shown, and the base weight is always needed.
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    without = ("exclude_modules",)
    default_targets = {  # noqa: RUF012
        **DEFAULT_TARGETS, "phi": ["q_proj", "v_proj"], "vit": ["query", "value"],
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FROD  # type: ignore[attr-defined]
        fields.rate(self, "frod_dropout")
        fields.choice(self, "bias", ("none", "all", "frod_only"))
        if not 0 <= self.sparse_rate <= 1:
            raise ConfigError(f"`sparse_rate` should be between 0 and 1, got {self.sparse_rate}.")


class Frod(Adapter):
    name, prefix, Config = "frod", "frod_", FrodConfig
    must_agree: ClassVar = {
        "projection_prng_key": "FRoD projection initialization key must be the same for all "
        "adapters",
        "save_projection": "FRoD projection weights must be saved for all adapters or none",
        "runtime_offload_base_weight": "FRoD runtime base-weight offloading must be enabled for "
        "all adapters or none",
    }
    constant = ("frod_V", "frod_s_indices", "frod_s_size", "frod_U", "_frod_start")

    @classmethod
    def shared(cls, config: FrodConfig, bases: dict[str, Base]) -> dict[int, tuple[str, Any]]:
        """Under each base's id: its kind, and what the kind shares."""
        kinds: dict[str, dict[tuple[int, int], Base]] = {}
        for fallback, (path, base) in enumerate(bases.items()):
            kinds.setdefault(_kind(path), {})[_index(path, fallback), fallback] = base
        source = generator(config.projection_prng_key)
        made: dict[int, tuple[str, Any]] = {}
        for kind in sorted(kinds):
            members = [base for _, base in sorted(kinds[kind].items(), key=lambda m: m[0])]
            width = size(members[0].shape)[1]
            v = torch.zeros(width, width)
            if not v.is_meta:
                v = _basis([b.read()[0].detach().flatten(1).float().cpu() for b in members],
                           config.regularization_alpha)  # fmt: skip
            parts = {"frod_V": v, "frod_s_indices": _places(width, config.sparse_rate, source),
                     "frod_s_size": torch.tensor([width, width])}  # fmt: skip
            held = {p: nn.Parameter(t, requires_grad=False) for p, t in parts.items()}
            made |= {id(base): (kind, held) for base in members}
        return made

    def build(self, base: Base, shared: dict[int, tuple[str, Any]]) -> None:
        config: FrodConfig = self.config
        kind, held = shared[id(base)]
        (n, k), count = size(base.shape), held["frod_s_indices"].shape[1]
        self.parts = {
            "frod_dropout": drop_part(config.frod_dropout),
            "frod_lambda_l": nn.Parameter(torch.zeros(k)),
            "frod_lambda_s_values": nn.Parameter(torch.zeros(count)), **held,
            "frod_U": nn.Parameter(torch.zeros(n, k), requires_grad=False),
            "_frod_start": nn.Parameter(torch.zeros(k), requires_grad=False),
        }  # fmt: skip
        self.values = {"r": n, "_frod_kind": kind}
        self.identity_at_init = config.init_weights  # type: ignore[misc]

    def start(self, base: Base) -> None:
        lengths = self["frod_lambda_l"]
        if lengths.is_meta:
            return
        self.decompose(base)
        with torch.no_grad():
            lengths.copy_(self["_frod_start"])
            if not self.config.init_weights:
                nn.init.normal_(self["frod_lambda_s_values"], std=0.1)
                lengths.add_(torch.randn_like(lengths) * 0.1)

    def decompose(self, base: Base) -> None:
        """U and l0 of W in the basis V."""
        w = base.read()[0].detach().flatten(1).double()
        v = near(self["frod_V"], w).double()
        try:
            columns = torch.linalg.solve(v, w.t()).t()
        except RuntimeError:
            columns = w @ torch.linalg.pinv(v, rtol=1e-6).t()
        lengths = torch.linalg.norm(columns, dim=0)
        there = lengths > 1e-12
        with torch.no_grad():
            self["_frod_start"].copy_(lengths)
            self["frod_U"].copy_(torch.where(there, columns / lengths.clamp(min=1e-12), 0.0))

    def file_key(self, part: str, leaf: str) -> str | None:
        if part in ("frod_U", "_frod_start"):
            return None
        if part in self.constant:
            return f"/{part}.{self['_frod_kind']}" if self.config.save_projection else None
        return super().file_key(part, leaf)

    def merged(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self._left() @ near(self["frod_V"], self["frod_U"]).t()
        return w.to(torch.promote_types(w.dtype, delta.dtype)) + delta.view(w.shape), bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y, p = base(x), self.rate("frod_dropout")
        u = self["frod_U"]
        if base.groups > 1:
            delta = (self._left() @ near(self["frod_V"], u).t()).view(base.shape)
            work = compute_dtype(x)
            return y + base.apply(base.drop(x, p).to(work), delta.to(work)).to(y.dtype)
        # S with the diagonal on it: (in, in), small beside the products it saves
        v = near(self["frod_V"], u)
        work = v.dtype if base.indexed else compute_dtype(x)
        x = x if base.indexed else base.drop(x, p).to(work)
        z = base.apply(x, v.t().to(work).reshape(-1, *base.shape[1:]))
        return y + base.mix(base.mix(z, self._middle().to(work)), u.to(work)).to(y.dtype)

    def _middle(self) -> Tensor:
        """S + diag(l - l0)."""
        values, start = self["frod_lambda_s_values"], self["_frod_start"]
        rows, columns = near(self["frod_s_indices"], values)
        k = start.numel()
        flat = values.new_zeros(k * k).scatter_add(0, rows * k + columns, values)
        middle: Tensor = flat.view(k, k) + torch.diag(self["frod_lambda_l"] - start)
        return middle

    def _left(self) -> Tensor:
        left: Tensor = self["frod_U"] @ self._middle()
        return left


def _basis(matrices: list[Tensor], alpha: float) -> Tensor:
    """V, as PEFT makes it: all right singular vectors where there are fewer rows than columns,
    else R^T times the eigenvectors of the mean of (Q_i^T Q_i + alpha)^-1."""
    stacked = torch.cat(matrices)
    if stacked.shape[0] < stacked.shape[1]:
        whole: Tensor = torch.linalg.svd(stacked, full_matrices=True)[2].t().contiguous()
        return whole
    q, r = torch.linalg.qr(stacked)
    eye = alpha * torch.eye(r.shape[1], dtype=r.dtype)
    total = torch.zeros_like(eye)
    for part in q.split([m.shape[0] for m in matrices]):
        total += torch.linalg.inv(part.t() @ part + eye)
    v: Tensor = r.t() @ torch.linalg.eigh(total / len(matrices))[1]
    return v


def _places(width: int, rate: float, source: torch.Generator) -> Tensor:
    """(2, count) rows and columns off the diagonal, in the order of PEFT's draw."""
    off = width * (width - 1)
    count = min(int(width * width * rate), off)
    if rate > 0 and off > 0:
        count = max(1, count)
    with torch.device("cpu"):
        flat = torch.randperm(off, generator=source)[:count] if count else torch.zeros(0).long()
        rows = flat // max(width - 1, 1)
        columns = flat % max(width - 1, 1)
        # each row's columns without its own
        return torch.stack([rows, columns + (columns >= rows)])


def _kind(path: str) -> str:
    """PEFT's category: the last name, with the one in front unless that is an index."""
    *front, last = path.split(".")
    if not front or front[-1].isdigit():
        return last
    if [*front[-2:], last][-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{front[-1]}_{last}"


def _index(path: str, fallback: int) -> int:
    """PEFT's layer index: after "layers", else the first number in the path."""
    names = path.split(".")
    if "layers" in names:
        after = names[names.index("layers") + 1 :][:1]
        if after and after[0].isdigit():
            return int(after[0])
    return next((int(n) for n in names if n.isdigit()), fallback)
