# SPDX-License-Identifier: Apache-2.0
"""What a merge keeps of an update: ours as it is, re-fitted and in 16 bit, and PEFT's.

    python bench/merge.py                 # writes results/cpu/merge.json
    python bench/merge.py --table         # docs/merging.md again, from that file

The seven linears of one layer of SmolLM2-135M's shapes, W ~ N(0, 0.02), LoRA r 16 with A and B
drawn at random and scaled so that ||s B A|| is the given part of ||W||. share: see
``fastadapt.merge``; along: ||E V|| / ||s B A||, E the error of the stored weight against W + s B A
and V an orthonormal basis of A's rows, the inputs that the update acts on; error: ||E|| / ||W||.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from report import machine
from torch import Tensor, nn

import fastadapt

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "bench" / "results" / "cpu" / "merge.json"
PAGE = ROOT / "docs" / "merging.md"
SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576),
          "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}  # fmt: skip
FORMATS = {"nf4": "NF4", "fp4": "FP4", "int8": "int8", "bf16": "bf16"}
SIZES = (0.003, 0.01, 0.03, 0.1)
WAYS = {"PEFT": "PEFT", "plain": "as it is", "refit": '`keep="refit"`', "16bit": '`keep="16bit"`'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write the page only")
    if not parser.parse_args().table:
        warnings.simplefilter("ignore")
        rows = [row for fmt in FORMATS for size in SIZES for row in measure(fmt, size)]
        FILE.write_text(
            json.dumps({"machine": machine(torch.device("cpu")), "rows": rows}, indent=1) + "\n"
        )
    made = page(json.loads(FILE.read_text())["rows"])
    held = PAGE.read_text()
    PAGE.write_text(re.sub(r"(?s)(?<=<!-- figures -->\n).*?(?=<!-- end -->)", made, held))


def measure(fmt: str, size: float) -> list[dict[str, Any]]:
    """One row a way: means over the layers, and the worst layer's share."""
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for name in SHAPES:
        for way in WAYS:
            found[way].append(one(fmt, name, size, way))
    return [
        {
            "format": fmt, "size": size, "way": way, "share": mean(f[0] for f in got),
            "least": min(f[0] for f in got), "along": mean(f[1] for f in got),
            "error": mean(f[2] for f in got),
        }
        for way, got in found.items()
    ]  # fmt: skip


def one(fmt: str, name: str, size: float, way: str) -> tuple[float, float, float]:
    torch.manual_seed(list(SHAPES).index(name))
    n, k = SHAPES[name]
    w = torch.randn(n, k) * 0.02
    package: Any = fastadapt
    if way == "PEFT":
        import peft

        package = peft
    root: Any = nn.ModuleDict({"layer": base(fmt, w)})
    # what PEFT asks a model of transformers
    root.is_loaded_in_4bit, root.is_loaded_in_8bit = fmt in ("nf4", "fp4"), fmt == "int8"
    config = package.LoraConfig(r=16, lora_alpha=16, target_modules=["layer"])
    model = package.get_peft_model(root, config, autocast_adapter_dtype=False)
    layer = model.base_model.model["layer"]
    before = stored(layer.base_layer)
    a, b = torch.randn(16, k) / k**0.5, torch.randn(n, 16)
    b *= size * before.norm() / (b @ a).norm()
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    a, b = (layer.get_submodule(f"lora_{p}.default").weight.detach().float() for p in "AB")
    change = b @ a
    layer.merge(**({"keep": way} if way in ("refit", "16bit") else {}))
    left = stored(layer.base_layer) - before - change
    basis = torch.linalg.qr(a.t())[0]
    share = 1 + ((left * change).sum() / change.square().sum()).item()
    along = ((left @ basis).norm() / change.norm()).item()
    return share, along, (left.norm() / before.norm()).item()


def base(fmt: str, w: Tensor) -> nn.Module:
    import bitsandbytes.nn as bnb

    n, k = w.shape
    if fmt == "bf16":
        layer: Any = nn.Linear(k, n, bias=False)
        layer.weight = nn.Parameter(w, requires_grad=False)
        return layer.to(torch.bfloat16)  # type: ignore[no-any-return]
    if fmt == "int8":
        layer = bnb.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
        layer.weight = bnb.Int8Params(w, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type=fmt)
        layer.support_avx512bf16_for_cpu = False
        layer.weight = bnb.Params4bit(w, requires_grad=False, quant_type=fmt, module=layer)
    return layer.to("cpu")  # type: ignore[no-any-return]


def stored(layer: Any) -> Tensor:
    """The weight as the format decodes it, float32."""
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        return dequantize_4bit(weight.data, weight.quant_state).float()
    if type(weight).__name__ == "Int8Params":
        rows = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        return weight.data.float() * (rows.view(-1, 1) / 127)
    return weight.detach().float()  # type: ignore[no-any-return]


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| format | update | " + " | ".join(WAYS.values()) + " |",
        "|---|---" * 1 + "|---" * len(WAYS) + "|",
    ]
    for fmt, name in FORMATS.items():
        for size in SIZES:
            got = {r["way"]: r for r in rows if (r["format"], r["size"]) == (fmt, size)}
            cells = [
                f"{r['share']:.1%} · {r['along']:.2f} · {r['error']:.2%}"
                for r in (got[w] for w in WAYS)
            ]
            lines.append(f"| {name} | {size:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
