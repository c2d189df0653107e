# SPDX-License-Identifier: Apache-2.0
"""LoRA files that image-model tools write: their keys as PEFT's (``dialect_writers``: the reverse).

kohya     lora_unet_<path with underscores>.lora_down.weight, .lora_up.weight, .alpha, .dora_scale;
          LyCORIS' hada_w1_a and its like
diffusers unet.<path>.lora_A.weight, .lora.down.weight, .lora_linear_layer.down.weight,
          attn1.processor.to_q_lora.down.weight; .alpha, .lora_magnitude_vector, .dora_scale

Such a file has no config: ranks are those of its tensors, and an adapter without alpha has
s = alpha / r = 1. Its paths belong to several models of one pipeline; the parts that are for
another model than the one at hand are left out, which the caller says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastadapt import slots, targets
from fastadapt.dialect_paths import COMPONENT, PathFinder
from fastadapt.errors import CheckpointError, UnsupportedError

DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_PARTS = {
    "lora_down.weight": DOWN,
    "lora_up.weight": UP,
    "lora_up.bias": "lora_B.bias",
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    "lora_linear_layer.down.weight": DOWN,
    "lora_linear_layer.up.weight": UP,
    "down.weight": DOWN,
    "up.weight": UP,
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_B.bias": "lora_B.bias",
    "dora_scale": MAGNITUDE,
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "alpha": "alpha",
    **{p: p for p in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
}
_UNBUILT = re.compile(r"\.(lora_mid\.weight|lokr_\w+|diff(_b)?|a1\.weight|oft_\w+|w_norm|b_norm)$")

_OWN_WORDS = re.compile(r"(\.lora\.|_lora\.|\.lora_linear_layer\.)(down|up)\.")
_IN_PIPELINE = re.compile(
    r"(unet|text_encoder\w*|transformer\w*|prior)\..*\.(lora_[AB]\.weight|alpha)$"
)


@dataclass
class Translation:
    """names: key -> PEFT's key; shapes: of keys whose tensor takes another shape; fields: of a
    config for the model; components: those of this model; other: those that are for other models;
    unknown: keys of this model's components that name none of its modules."""

    names: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    components: set[str] = field(default_factory=set)
    other: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)


def foreign(keys: Iterable[str]) -> bool:
    """The keys are of a dialect and not PEFT's own."""
    return any(COMPONENT.match(k) or _OWN_WORDS.search(k) or _IN_PIPELINE.match(k) for k in keys)


def translate(
    shapes: Mapping[str, tuple[int, ...]],
    modules: Iterable[str],
    alpha_of: Callable[[str], float],
    levels: int = 2,
) -> Translation:
    """What a file's keys mean for a model with these module paths.

    alpha_of: the value of a key's tensor of one element; levels: ``layers_per_block`` of a U-Net.
    Raises UnsupportedError for parts that no method of ours has, CheckpointError for a file of
    nothing for this model."""
    unbuilt = sorted({m[1] for k in shapes if (m := _UNBUILT.search(k))})
    if unbuilt:
        raise UnsupportedError(f"parts that no adapter of fastadapt has: {', '.join(unbuilt)}")
    find = PathFinder(list(modules), levels)
    found = Translation()
    by_path: dict[str, dict[str, str]] = {}
    lost: dict[str, list[str]] = {}
    for key in shapes:
        stem, part = split_key(key)
        component, path = find(stem)
        if path is None or part is None:
            lost.setdefault(component, []).append(key)
            continue
        held = by_path.setdefault(path, {})
        if part in held:
            raise CheckpointError(f"{held[part]} and {key} are both {part} of {path}")
        held[part] = key
        find.used.add(component)
    for component, keys in lost.items():
        if component in find.used or not component:
            found.unknown += keys
        else:
            found.other.add(component)
    if not by_path:
        raise CheckpointError(
            f"no key names a module of this model, the first is {next(iter(shapes), None)!r}: is "
            "the file for another model?"
        )
    for path, held in by_path.items():
        for part, key in held.items():
            if part != "alpha":
                found.names[key] = f"{slots.PREFIX}{path}.{part}"
        if MAGNITUDE in held:
            found.shapes[held[MAGNITUDE]] = _magnitude_shape(shapes, held, path)
    found.components = find.used
    found.fields = _fields(by_path, shapes, alpha_of, find.modules)
    return found


def split_key(key: str) -> tuple[str, str | None]:
    """(stem, PEFT's part) of a key; the part is None when it is none that is known."""
    for part, name in _PARTS.items():
        if key.endswith(f".{part}"):
            return key.removesuffix(f".{part}"), name
    return key.rpartition(".")[0], None


def _magnitude_shape(
    shapes: Mapping[str, tuple[int, ...]], held: dict[str, str], path: str
) -> tuple[int, ...]:
    """PEFT's: (out,), or (1, out, 1, ...) of a convolution. LyCORIS may have a norm for each
    input instead, which is another method."""
    have, up = shapes[held[MAGNITUDE]], shapes.get(held.get(UP, ""), ())
    if len(up) < 2:
        return have
    if len(have) > 1 and have[0] == 1 != up[0] and len(up) == 2:
        raise UnsupportedError(
            f"dora_scale of {path}: expected a norm for each output ({up[0]},), got {have}, one "
            "for each input"
        )
    return (up[0],) if len(up) == 2 else (1, up[0], *[1] * (len(up) - 2))


def _fields(
    by_path: dict[str, dict[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    alpha_of: Callable[[str], float],
    modules: list[str],
) -> dict[str, Any]:
    """The values of the LoraConfig or LoHaConfig that the tensors were trained with."""
    loha = {p for p, held in by_path.items() if any(part.startswith("hada_") for part in held)}
    if loha and len(loha) < len(by_path):
        raise UnsupportedError("LoRA and LoHa layers in one file: load it as two adapters")
    down, dim = ("hada_w1_b", 0) if loha else (DOWN, 0)
    ranks, alphas = {}, {}
    for path, held in by_path.items():
        shape = shapes.get(held.get(down, ""), ())
        ranks[path] = shape[dim] if shape else 0
        alphas[path] = alpha_of(held["alpha"]) if "alpha" in held else float(ranks[path])
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    others = [m for m in modules if m not in by_path]
    fields: dict[str, Any] = {
        "peft_type": "LOHA" if loha else "LORA",
        "r": r,
        "alpha" if loha else "lora_alpha": _whole(alpha),
        "target_modules": targets.shortest(by_path, others),
        "rank_pattern": {p: n for p, n in ranks.items() if n != r},
        "alpha_pattern": {p: _whole(a) for p, a in alphas.items() if a != alpha},
    }
    if loha:
        fields["use_effective_conv2d"] = any("hada_t1" in held for held in by_path.values())
        return fields
    scaled = [p for p, held in by_path.items() if MAGNITUDE in held]
    if scaled and len(scaled) < len(by_path):
        plain = next(p for p in by_path if p not in scaled)
        raise UnsupportedError(
            f"DoRA on {len(scaled)} of {len(by_path)} layers (not on {plain}): one adapter has it "
            "on all or on none"
        )
    fields["use_dora"] = bool(scaled)
    fields["lora_bias"] = any("lora_B.bias" in held for held in by_path.values())
    return fields


def _whole(value: float) -> float | int:
    return int(value) if value.is_integer() else value
