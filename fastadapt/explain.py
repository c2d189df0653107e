# SPDX-License-Identifier: Apache-2.0
"""What runs where: one record for every module that holds parameters."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import targets
from fastadapt.base import FrozenLayer
from fastadapt.errors import KernelError, MissingExtraError
from fastadapt.layer import AdaptedLayer
from fastadapt.modules_to_save import ModulesToSaveWrapper
from fastadapt.ops.bits import flatten
from fastadapt.ops.dispatch import IMPLEMENTATIONS
from fastadapt.ops.low_rank import low_rank_fwd


@dataclass(frozen=True, kw_only=True)
class Record:
    """One module.

    adapters: name -> method; implementation: what runs the adapted product ("native",
    "reference", "layer" when the base layer itself is called, "plain" when the method multiplies
    in plain PyTorch, "peft" when PEFT's own forward runs), None for a module without adapter;
    reason: why a faster one does not;
    flops: of the active adapters, per token, forward; fused: those of them that fused ops do.
    """

    module: str
    kind: str
    format: str
    parameters: int
    trainable: int
    adapters: dict[str, str] = field(default_factory=dict)
    implementation: str | None = None
    reason: str | None = None
    flops: int = 0
    fused: int = 0


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """records: one a module; tokens: the token count they are for."""

    records: list[dict[str, Any]]
    tokens: int

    @property
    def coverage(self) -> float:
        """The share of the adapters' FLOPs that run in fused ops rather than beside the layer."""
        total = sum(r["flops"] for r in self.records)
        return sum(r["fused"] for r in self.records) / total if total else 0.0

    def require(self, share: float) -> None:
        """Raise KernelError, with every layer that is not fused, when ``coverage`` is less."""
        if self.coverage >= share:
            return
        slow = [r for r in self.records if r["fused"] < r["flops"] or (
            r["adapters"] and r["implementation"] not in (None, *IMPLEMENTATIONS))]  # fmt: skip
        reasons: dict[str, list[str]] = {}
        for r in slow:
            reasons.setdefault(str(r["reason"]), []).append(r["module"])
        raise KernelError(
            f"expected {share:.0%} of the adapters' FLOPs in fused ops, got {self.coverage:.0%}; "
            "not fused: " + "; ".join(f"{', '.join(m)}: {why}" for why, m in reasons.items())
        )

    def implementations(self) -> dict[str, int]:
        """implementation -> number of layers."""
        return dict(Counter(r["implementation"] for r in self.records if r["implementation"]))

    def to_json(self) -> str:
        values = {"tokens": self.tokens, "coverage": self.coverage, "records": self.records}
        return json.dumps(values, indent=2)

    def table(self) -> Any:
        """A rich table, equal modules of different layers on one line."""
        try:
            from rich.table import Table
        except ImportError as error:
            raise MissingExtraError("rich", "train", "the table of explain") from error

        rows: dict[tuple[str, ...], list[int]] = {}
        for r in self.records:
            name = ".".join("*" if p.isdigit() else p for p in r["module"].split("."))
            method = ", ".join(sorted(set(r["adapters"].values()))) or "-"
            runs, why = r["implementation"] or "-", r["reason"] or ""
            key = (name, str(r["kind"]), str(r["format"]), method, str(runs), str(why))
            count = rows.setdefault(key, [0, 0, 0])
            count[0] += 1
            count[1] += r["trainable"]
            count[2] += r["flops"]
        table = Table(
            title=f"fastadapt, {self.tokens} tokens: {self.coverage:.0%} of adapter FLOPs fused"
        )
        for column in ("module", "kind", "format", "method", "runs on", "why not faster"):
            table.add_column(column, overflow="fold")
        table.add_column("FLOPs", justify="right")
        table.add_column("layers", justify="right")
        table.add_column("trainable", justify="right")
        total = sum(r["flops"] for r in self.records)
        for cells, (layers, trainable, flops) in rows.items():
            share = f"{flops / total:.0%}" if flops else "-"
            table.add_row(*cells, share, str(layers), f"{trainable:,}")
        return table

    def __str__(self) -> str:
        from io import StringIO

        table = self.table()
        from rich.console import Console

        out = StringIO()
        Console(file=out, width=140).print(table)
        return out.getvalue()


def explain(model: Any, tokens: int = 512, *, require: float | None = None) -> Explanation:
    """Records for every module of ``model`` that holds parameters, adapted or not.

    tokens: the token count that implementations are chosen for
    require: raise KernelError when less than this share of adapter FLOPs is fused (0 to 1)
    """
    root = getattr(model, "adapter_root", model)
    records = []
    for path, module in [("", root), *targets.walk(root)]:
        own = list(module.parameters(recurse=targets.is_adapted(module)))
        if own:
            records.append(asdict(_record(path, module, own, tokens)))
    result = Explanation(records=records, tokens=tokens)
    if require is not None:
        result.require(require)
    return result


def _record(path: str, module: nn.Module, own: list[Any], tokens: int) -> Record:
    trainable = sum(p.numel() for p in own if p.requires_grad)
    facts: dict[str, Any] = {"kind": type(module).__name__, "format": "dense"}
    frozen = getattr(module, "frozen", None)
    if isinstance(frozen, FrozenLayer):
        held: Any = module
        facts = {"kind": frozen.kind.name, "format": frozen.weight.name}
        facts |= _of_layer(held, tokens)
    elif isinstance(module, ModulesToSaveWrapper):
        facts["kind"] = type(module.original_module).__name__
        facts["adapters"] = dict.fromkeys(module.modules_to_save, "modules_to_save")
    elif targets.is_adapted(module):
        facts |= _of_peft(module)
        facts["flops"] = sum(_flops(module).values()) if facts["implementation"] else 0
    elif type(own[0]).__name__ == "Params4bit":
        facts["format"] = "bnb4"
    elif type(own[0]).__name__ == "Int8Params":
        facts["format"] = "bnb8"
    return Record(module=path, parameters=sum(p.numel() for p in own), trainable=trainable, **facts)


def _of_layer(layer: Any, tokens: int) -> dict[str, Any]:
    """The facts of an adapted layer, ours or PEFT's that we speed up."""
    flops = _flops(layer)
    active = {n: layer.adapters[n] for n in layer.active_adapters if n in layer.adapters}
    why = _idle(layer, active) or _beside(layer)
    asked = {} if why else {n: _asks(a, layer.frozen) for n, a in active.items()}
    fused = {n for n, what in asked.items() if what == "op"}
    for name, what in asked.items():
        if why is None and what != "op":
            why = what, f"{active[name].name}: {_ASKED[what]}"
    runs, reason = why or _implementation(layer.frozen, next(iter(active.values())), tokens)
    return {
        "adapters": {n: a.name for n, a in layer.adapters.items()},
        "implementation": runs,
        "reason": reason,
        "flops": sum(flops.values()),
        "fused": sum(flops[n] for n in fused),
    }


def _idle(layer: Any, active: dict[str, Any]) -> tuple[str, str] | None:
    """Why no adapter runs, if none does."""
    if not isinstance(layer, AdaptedLayer) and (reason := layer.why_not_ours()) is not None:
        return "peft", reason
    if layer.disable_adapters or layer.merged or not active:
        off = "disabled" if layer.disable_adapters else "merged" if layer.merged else "not active"
        return "layer", f"the adapters are {off}"
    return None


def _beside(layer: Any) -> tuple[str, str] | None:
    reason = layer.frozen.why_not_fused()
    return None if reason is None else ("layer", reason)


_ASKED = {
    "layer": "the method changes the layer's input or output, and calls it",
    "plain": "the method multiplies by a weight of its own in plain PyTorch",
}


def _asks(adapter: Any, frozen: FrozenLayer) -> str:
    """What the method asks of its base first: "op", "layer" or "plain"."""
    weight = frozen.weight.layer.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.zeros(1, frozen.shape[1], dtype=dtype, device=weight.device)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            adapter.forward(x, _Probe(frozen))
    except _Asked as asked:
        return str(asked)
    return "plain"


class _Asked(Exception):
    pass


class _Probe:
    """A base that runs nothing: it says what was asked of it first."""

    def __init__(self, base: FrozenLayer) -> None:
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __call__(self, x: Tensor) -> Tensor:
        raise _Asked("layer")

    def low_rank(self, *_: Any) -> Tensor:
        raise _Asked("op")

    def apply(self, *_: Any) -> Tensor:
        raise _Asked("plain")

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x

    def row_norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return a.new_ones(self._base.shape[0])


def _of_peft(module: Any) -> dict[str, Any]:
    """The facts of a layer or wrapper of PEFT's that was not patched."""
    whole = getattr(module, "modules_to_save", None)
    if whole is not None:
        kind = type(module.original_module).__name__
        adapters = dict.fromkeys(whole, "modules_to_save")
        return {"kind": kind, "adapters": adapters, "implementation": None}
    names = {n for part in module.adapter_layer_names for n in getattr(module, part, ())}
    method = type(module).__module__.removeprefix("peft.tuners.").partition(".")[0]
    return {
        "adapters": dict.fromkeys(sorted(names), method),
        "implementation": "peft",
        "reason": f"PEFT's {type(module).__name__} layer, not patched by fastadapt",
    }


def _flops(layer: Any) -> dict[str, int]:
    """Of each active adapter, per token: two for every parameter beside the base layer, trained
    or frozen."""
    found = {}
    for name in layer.active_adapters:
        parts = [getattr(layer, part) for part in layer.adapter_layer_names]
        held = [part[name] for part in parts if name in part]
        tensors = [t for p in held for t in (p.parameters() if isinstance(p, nn.Module) else [p])]
        found[name] = 2 * sum(t.numel() for t in tensors)
    return found


def _implementation(frozen: FrozenLayer, adapter: Any, tokens: int) -> tuple[str, str | None]:
    """What the fused op runs on for this many tokens, and why nothing faster."""
    pair = adapter.low_rank_pair()
    device = frozen.weight.layer.weight.device
    x = torch.empty((tokens, frozen.shape[1]), dtype=frozen.dtype, device=device)
    a, b = (x.new_empty(8, x.shape[1]), x.new_empty(0)) if pair is None else (pair.a, pair.b)
    args = (x, None, a, b, 1.0, 0.0, None, x.dtype, x.dtype, *flatten(frozen.bits()))
    chosen = low_rank_fwd.choose(*args)
    faster = IMPLEMENTATIONS[: IMPLEMENTATIONS.index(chosen)]
    reasons = [low_rank_fwd.why_not(i, *args) for i in faster]
    return chosen, "; ".join(r for r in reasons if r) or None
