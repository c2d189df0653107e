# SPDX-License-Identifier: Apache-2.0
"""Which module of a model a path in another tool's spelling means: underscores for dots, the name
of a pipeline's component in front, the original U-Net's blocks, diffusers' attention processors."""

from __future__ import annotations

import re

COMPONENT = re.compile(r"(lora|lycoris)_(unet|te\d?|transformer|prior(_unet|_te)?)_")
_OLD = {".to_q_lora": "q", ".to_k_lora": "k", ".to_v_lora": "v", ".to_out_lora": "out"}


class PathFinder:
    """stem of a key -> (component, path of a module or None)."""

    def __init__(self, modules: list[str], levels: int) -> None:
        self.modules = modules
        self.levels = levels
        self.used: set[str] = set()
        self._known = set(modules)
        self._flat = {m.replace(".", "_"): m for m in modules}

    def __call__(self, stem: str) -> tuple[str, str | None]:
        if "." not in stem:
            match = COMPONENT.match(stem)
            rest = stem[match.end() :] if match else stem
            flat = self._flat.get(rest) or self._flat.get(_from_blocks(rest, self.levels))
            return match[0].rstrip("_") if match else "", flat
        if stem in self._known:
            return "", stem
        component, _, rest = stem.partition(".")
        for form in (stem, rest):
            path = next((p for p in _spellings(form) if p in self._known), None)
            if path is not None:
                return ("" if form == stem else component), path
        return component, None


def _spellings(path: str) -> list[str]:
    """The names that a dotted path may have in the model."""
    path = path.replace(".processor.", ".")
    for old, new in _OLD.items():
        if path.endswith(old):
            stem = path.removesuffix(old)
            inner = ".to_out.0" if new == "out" else f".to_{new}"
            return [stem + inner, f"{stem}.{new}_proj"]
    return [path, f"{path}.0"] if path.endswith(".to_out") else [path]


_INNER = ("resnets", "attentions", "upsamplers")
_RESNET = {
    "in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}  # fmt: skip


def _from_blocks(stem: str, levels: int) -> str:
    """``input_blocks_4_1_proj_in`` of the original U-Net -> ``down_blocks_1_attentions_0_proj_in``
    of diffusers'; levels: resnets in a block of the way down."""
    match = re.match(r"(input_blocks|middle_block|output_blocks)_(\d+)_(?:(\d)_)?(.*)", stem)
    if match is None:
        return stem
    side, number, inner, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        rest = f"{inner}_{rest}" if inner is not None else rest
        place = {0: "resnets_0", 1: "attentions_0", 2: "resnets_1"}.get(number)
        name = f"mid_block_{place}"
    elif side == "input_blocks":
        block, layer = divmod(number - 1, levels + 1)
        kind = (
            "downsamplers_0" if rest.startswith("op") else f"{_INNER[int(inner or 0) % 3]}_{layer}"
        )
        name = f"down_blocks_{block}_{kind}"
    else:
        block, layer = divmod(number, levels + 1)
        at = int(inner or 0) % 3
        name = f"up_blocks_{block}_{_INNER[at]}_{layer if at < 2 else 0}"
    rest = {"op": "conv"}.get(rest, _RESNET.get(rest, rest))
    return f"{name}_{rest}"
