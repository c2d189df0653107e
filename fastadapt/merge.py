# SPDX-License-Identifier: Apache-2.0
"""Merge an update into one stored weight, and say what of it the format kept.

    share = <stored - W, W' - W> / ||W' - W||^2

W: the weight before, W': with its adapters, stored: what the format holds afterwards. A format
that rounds to codes far apart loses most of a small update: each value rounds back to its old code.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastadapt.base import FrozenLayer
from fastadapt.errors import FastAdaptWarning, LifecycleError

KEEP = ("refit", "16bit")
LEAST = 0.9
"""A layer that keeps less of its update than this gets the warning, or what ``keep`` asks for."""


@dataclass(frozen=True, kw_only=True)
class LayerMerge:
    """What became of one layer's update.

    share: of the update, in the stored weight; size: ||W' - W|| / ||W||;
    stored: "" for the layer's own rounding, "refit" or "16bit"."""

    share: float
    size: float
    stored: str = ""


@dataclass
class MergeReport:
    """``layers``: path -> what became of the layer's update. ``str(report)`` is a table, the worst
    layer first."""

    layers: dict[str, LayerMerge] = field(default_factory=dict)

    def add(self, path: str, merged: LayerMerge | None) -> None:
        """A layer that was merged; None for one that was not."""
        if merged is not None:
            self.layers[path] = merged

    @property
    def share(self) -> float:
        """The least share of all layers; 1 without layers."""
        return min((m.share for m in self.layers.values()), default=1.0)

    def below(self, share: float = LEAST) -> dict[str, LayerMerge]:
        """The layers that keep less than this, the worst first."""
        low = ((p, m) for p, m in self.layers.items() if m.share < share)
        return dict(sorted(low, key=lambda item: item[1].share))

    def __str__(self) -> str:
        lines = [f"{'kept':>8}  {'update':>8}  layer"]
        for path, m in sorted(self.layers.items(), key=lambda item: item[1].share):
            stored = f"  ({m.stored})" if m.stored else ""
            lines.append(f"{m.share:8.1%}  {m.size:8.2%}  {path}{stored}")
        return "\n".join(lines)

    def warn(self, least: float) -> None:
        """One warning for all layers that kept too little."""
        low = self.below(least)
        if not low:
            return
        path, worst = next(iter(low.items()))
        warnings.warn(
            f"merging kept less than {least:.0%} of the update in {len(low)} of "
            f"{len(self.layers)} layers: {path} keeps {worst.share:.1%} of a change of "
            f"{worst.size:.2%}, the rest was rounded away by the format of the weight. Merge with "
            "keep='refit' or keep='16bit', or into a 16-bit base; model.merge_report has all "
            "layers",
            FastAdaptWarning,
            stacklevel=4,
        )


def check_keep(keep: str | None, keep_share: float) -> None:
    """Raise LifecycleError for what ``merge`` cannot do."""
    if keep is not None and keep not in KEEP:
        raise LifecycleError(f"keep: expected None or one of {KEEP}, got {keep!r}")
    if not isinstance(keep_share, int | float) or not 0 <= keep_share <= 1:
        raise LifecycleError(f"keep_share: expected a share from 0 to 1, got {keep_share!r}")


def write(
    frozen: FrozenLayer, w: Tensor, bias: Tensor | None, keep: str | None, keep_share: float
) -> tuple[LayerMerge, nn.Module | None]:
    """Store w, so that ``keep_share`` of the update is in it where ``keep`` says how.

    Also gives the layer that must stand in the place of the quantised one, for keep="16bit"."""
    before = frozen.read()[0].float()
    asked = w.float() - before
    old, whole = before.norm(), asked.norm()
    size = (whole / old).item() if old > 0 else 0.0

    def share() -> float:
        if not whole > 0:
            return 1.0
        change = frozen.read()[0].float() - before
        return float((change * asked).sum() / whole.square())

    held = frozen.snapshot()
    frozen.write(w, bias)
    kept = share()
    # (a weight that is not finite keeps NaN of its update, which is not less)
    if keep is None or not kept < keep_share:
        return LayerMerge(share=kept, size=size), None
    frozen.restore(held)
    if keep == "refit":
        frozen.write(w, bias, refit=True)
        return LayerMerge(share=share(), size=size, stored=keep), None
    wide: Any = frozen.in_16_bit(w, held[1] if bias is None else bias)
    if wide is None:
        frozen.write(w, bias)
        return LayerMerge(share=kept, size=size), None
    frozen = FrozenLayer(wide)
    return LayerMerge(share=share(), size=size, stored=keep), wide


def leave_out(model: nn.Module, report: MergeReport) -> None:
    """A model that loads its files quantised must leave the layers out that are not any more."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    wide = [path for path, m in report.layers.items() if m.stored == "16bit"]
    if config is None or not wide:
        return
    key = "llm_int8_skip_modules"
    held = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
    if held is None:
        # a list replaces the loader's own choice, which is the output head
        head = getattr(model, "get_output_embeddings", lambda: None)()
        held = [n for n, m in model.named_modules() if head is not None and m is head]
    skipped = [*held, *(p for p in wide if p not in held)]
    config.__setitem__(key, skipped) if isinstance(config, dict) else setattr(config, key, skipped)
