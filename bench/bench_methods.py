# SPDX-License-Identifier: Apache-2.0
"""One training step of each method, against LoRA of the same targets and against PEFT's own.

    python bench/bench_methods.py --quick                   # two layers, to see that it runs
    python bench/bench_methods.py --methods psoft osf ...   # 8 layers of SmolLM2-135M's shapes
    python bench/bench_methods.py --device cuda             # Llama-3.2-3B's shapes, 4 x 768

The decoder alone (no head, no loss over a vocabulary), random weights, dense; adapters on q_proj
and v_proj, which are PEFT's defaults; forward, backward and SGD. LoRA has r = 32, a method its
defaults. The contenders of one method take turns in one process, one step each a round, after one
step that is not counted. ``--out`` adds to the rows that the file has.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from report import machine
from torch import Tensor

import fastadapt
from fastadapt.methods import METHODS, method_of

SHAPES = {
    "quick": (2, 192, 512, 3, 3), "smollm2-8": (8, 576, 1536, 9, 3),
    "llama-3b": (28, 3072, 8192, 24, 8),
}  # fmt: skip
"""Name -> layers, hidden size, feed-forward size, heads, key and value heads."""

FIELDS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 32, "lora_alpha": 64},
    "ADALORA": {"init_r": 32, "target_r": 16, "total_step": 1000},
    "LOHA": {"r": 32}, "LOKR": {"r": 32}, "HIRA": {"r": 32}, "DELORA": {"r": 32},
    "DEFT": {"r": 32}, "OSF": {"effective_rank": 128}, "C3A": {"block_size": 64},
    "FROD": {"progressbar": False}, "IA3": {"feedforward_modules": []},
    "VBLORA": {"vector_length": 64},
}  # fmt: skip
"""Fields that are not a method's defaults: LoRA's rank where a rank can be chosen, sizes that
divide 576, and what a method asks for."""

SEVERAL = {
    "dora": ("LORA", {"r": 32, "lora_alpha": 64, "use_dora": True}),
    **{name.lower(): (name, FIELDS.get(name, {})) for name in METHODS},
}
"""Row -> (peft_type, fields)."""


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    done: dict[str, Any] = {}
    if options.out and options.out.exists():
        done = json.loads(options.out.read_text())["rows"]
    for row in options.methods or [r for r in SEVERAL if r != "lora"]:
        done[row] = measured(row, options)
        print(line(row, done[row]), flush=True)
        if options.out:
            facts = {"machine": machine(torch.device(options.device)), "shapes": options.shapes,
                     "batch": options.batch, "length": options.length, "rows": done}  # fmt: skip
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(facts, indent=1) + "\n")


def measured(row: str, options: Any) -> dict[str, Any]:
    """Every sample of one method's contenders."""
    makers: dict[str, Callable[[], Any]] = {
        "lora": lambda: ours("lora", options), "ours": lambda: ours(row, options),
        "peft": lambda: theirs(row, options),
    }  # fmt: skip
    steps: dict[str, Any] = {}
    reasons = {}
    for who, make in makers.items():
        try:
            steps[who] = Step(make(), options)
            steps[who]()
        except Exception as error:
            reasons[who] = f"{type(error).__name__}: {error}"[:200]
            steps.pop(who, None)
    found: dict[str, Any] = {"reasons": reasons} if reasons else {}
    memory = {who: step.memory() for who, step in steps.items()}
    times: dict[str, list[float]] = {who: [] for who in steps}
    for i in range(options.rounds):
        order = list(steps)
        for who in order if i % 2 == 0 else reversed(order):
            times[who].append(steps[who]())
    for who in steps:
        found[who] = {"ms": times[who], "median_ms": statistics.median(times[who]), **memory[who]}
    steps.clear()
    gc.collect()
    return found


class Step:
    """One training step of a model; calling it gives the milliseconds."""

    def __init__(self, model: Any, options: Any) -> None:
        self.model, self.cuda = model.train(), options.device == "cuda"
        size = (options.batch, options.length)
        self.tokens = torch.randint(0, 64, size, generator=torch.Generator().manual_seed(1))
        self.tokens = self.tokens.to(options.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained, self.sgd = sum(p.numel() for p in trained), torch.optim.SGD(trained, lr=1e-4)

    def loss(self) -> Tensor:
        value: Tensor = self.model(self.tokens).last_hidden_state.float().square().mean()
        return value

    def __call__(self) -> float:
        self._wait()
        start = time.perf_counter()
        self.loss().backward()
        self.sgd.step()
        self.sgd.zero_grad()
        self._wait()
        return (time.perf_counter() - start) * 1000

    def memory(self) -> dict[str, int | None]:
        """Bytes that autograd holds after the forward pass without what the model holds anyway;
        the peak that a step adds, on a GPU."""
        held = {t.untyped_storage().data_ptr()
                for t in (*self.model.parameters(), *self.model.buffers())}  # fmt: skip
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.is_sparse:
                for part in (tensor._indices(), tensor._values()):
                    pack(part)
                return tensor
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        del loss
        peak = None
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self()
            peak = torch.cuda.max_memory_allocated() - before
        return {"saved_bytes": sum(seen.values()), "peak_bytes": peak, "trained": self.trained}

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def base(options: Any) -> Any:
    from transformers import LlamaConfig, LlamaModel

    layers, hidden, middle, heads, kv = SHAPES[options.shapes]
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    with torch.device(options.device):
        return LlamaModel(config).to(dtype)


def values(row: str, options: Any) -> dict[str, Any]:
    peft_type, more = SEVERAL[row]
    targets = ["input_layernorm"] if peft_type == "LN_TUNING" else ["q_proj", "v_proj"]
    known = method_of(peft_type).Config.known_fields()
    more = {k: v for k, v in more.items() if k in known}
    return {"peft_type": peft_type, "target_modules": targets, **more}


def ours(row: str, options: Any) -> Any:
    return fastadapt.get_peft_model(base(options), fastadapt.config.from_dict(values(row, options)))


def theirs(row: str, options: Any) -> Any:
    import peft

    fields = values(row, options)
    config = getattr(peft, method_of(fields.pop("peft_type")).Config.__name__)
    return peft.get_peft_model(base(options), config(**fields))


def line(row: str, found: dict[str, Any]) -> str:
    """Ratios of the medians, and of what is saved for backward."""
    cells = [f"{row:12s}"]
    for who in ("lora", "ours", "peft"):
        got = found.get(who)
        cells.append(f"{who} {got['median_ms']:8.1f} ms" if got else f"{who} -")
    cells += [f"/{who} {ratio:.2f}" for who, ratio in ratios(found)]
    return "  ".join(cells)


def ratios(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for who in ("lora", "peft"):
        if who in found and "ours" in found:
            yield who, found["ours"]["median_ms"] / found[who]["median_ms"]
    if "lora" in found and "ours" in found:
        yield "saved", found["ours"]["saved_bytes"] / max(found["lora"]["saved_bytes"], 1)


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="two small layers, one round")
    parser.add_argument("--shapes", choices=SHAPES)
    parser.add_argument("--methods", nargs="*", choices=SEVERAL, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    large = options.device == "cuda"
    options.shapes = options.shapes or ("llama-3b" if large else "smollm2-8")
    if options.quick:
        options.shapes, options.rounds = "quick", 1
    options.batch = options.batch or (4 if large and not options.quick else 2)
    options.length = options.length or (768 if large and not options.quick else 256)
    return options


if __name__ == "__main__":
    main()
