# SPDX-License-Identifier: Apache-2.0
"""One training step of each method, against LoRA of the same targets and against PEFT's own.

    python bench/bench_methods.py --quick                   # two layers, to see that it runs
    python bench/bench_methods.py --methods psoft osf ...   # 8 layers of SmolLM2-135M's shapes
    python bench/bench_methods.py --device cuda             # Llama-3.2-3B's shapes, 4 x 768
    python bench/methods_table.py                           # results into docs/methods.md

The decoder alone (no head, no loss over a vocabulary), random weights, dense; adapters on q_proj
and v_proj, which are PEFT's defaults; forward, backward and SGD. LoRA has r = 32, a method its
defaults. The contenders of one method take turns in one process, one step each a round and PEFT
every other round, after one step that is not counted and one whose memory is. A ratio is the
median over rounds of two neighbours' times, so that a slow minute of the machine hits both.
Peak memory is what the model's tensors take and the most that a step has allocated beside them.
``--out`` adds to the rows that the file has.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
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

LORA = {"r": 32, "lora_alpha": 64}
FIELDS: dict[str, dict[str, Any]] = {
    "LORA": LORA,
    "ADALORA": {"init_r": 32, "target_r": 16, "total_step": 1000},
    "LOHA": {"r": 32}, "LOKR": {"r": 32}, "HIRA": {"r": 32}, "DELORA": {"r": 32},
    "DEFT": {"r": 32}, "OSF": {"effective_rank": 128}, "C3A": {"block_size": 64},
    "FROD": {"progressbar": False}, "IA3": {"feedforward_modules": []},
    "VBLORA": {"vector_length": 64},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2, 3]},
}  # fmt: skip
"""Fields that are not a method's defaults: LoRA's rank where a rank can be chosen, sizes that
divide 576, and what a method asks for."""

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name.lower(): (name, FIELDS.get(name, {})) for name in METHODS},
    "dora": ("LORA", {**LORA, "use_dora": True}),
    "qalora": ("LORA", {**LORA, "use_qalora": True, "qalora_group_size": 16}),
    "kasa": ("LORA", {**LORA, "kasa_config": {}}),
    "boft_wide": ("BOFT", {"boft_block_size": 8, "boft_n_butterfly_factor": 3}),
    "loha_8": ("LOHA", {"r": 8}),
    "miss_bat": ("MISS", {"init_weights": "bat"}),
    "waveft_sym4": ("WAVEFT", {"wavelet_family": "sym4"}),
    "fourierft_5000": ("FOURIERFT", {"n_frequency": 5000}),
    "waveft_5000": ("WAVEFT", {"n_frequency": 5000}),
}
"""Row -> (peft_type, fields)."""


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    rows: dict[str, Any] = {}
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text())["rows"]
    lora = Step(ours("lora", options), options)
    for row in options.methods or [r for r in ROWS if r != "lora"]:
        rows[row] = measured(row, lora, options)
        print(line(row, rows[row]), flush=True)
        if options.out:
            facts = {"machine": machine(torch.device(options.device)), "shapes": options.shapes,
                     "batch": options.batch, "length": options.length, "rows": rows}  # fmt: skip
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(facts, indent=1) + "\n")


class Step:
    """One training step of a model; calling it gives the milliseconds."""

    def __init__(self, model: Any, options: Any) -> None:
        self.model, self.cuda = model.train(), options.device == "cuda"
        size = (options.batch, options.length)
        self.tokens = torch.randint(0, 64, size, generator=torch.Generator().manual_seed(1))
        self.tokens = self.tokens.to(options.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained, self.sgd = sum(p.numel() for p in trained), torch.optim.SGD(trained, lr=1e-4)
        self()
        self.peak = self._peak()

    def __call__(self) -> float:
        self._wait()
        start = time.perf_counter()
        output: Tensor = self.model(self.tokens).last_hidden_state
        output.float().square().mean().backward()
        self.sgd.step()
        self.sgd.zero_grad()
        self._wait()
        return (time.perf_counter() - start) * 1000

    def _peak(self) -> int:
        """Bytes of the model's tensors, and the most that a step has allocated beside them."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        held = sum(storages.values())
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self()
            return held + torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            self()
        # the events as they come, since the profiler's own sums know no peak
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        most = now = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return held + most

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def measured(row: str, lora: Step, options: Any) -> dict[str, Any]:
    """Every sample of one method's contenders."""
    steps, reasons = {"lora": lora}, {}
    for who, make in (("ours", ours), ("peft", theirs)):
        try:
            steps[who] = Step(make(row, options), options)
        except Exception as error:
            reasons[who] = f"{type(error).__name__}: {error}"[:200]
        gc.collect()
    times: dict[str, list[float]] = {who: [] for who in steps}
    for i in range(options.rounds):
        order = [who for who in steps if who != "peft" or i % 2 == 0]
        for who in order if i % 4 < 2 else reversed(order):
            times[who].append(steps[who]())
    found: dict[str, Any] = {"reasons": reasons} if reasons else {}
    for who, step in steps.items():
        found[who] = {"ms": times[who], "peak_bytes": step.peak, "trained": step.trained}
    return found


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


def values(row: str) -> dict[str, Any]:
    peft_type, more = ROWS[row]
    return {"peft_type": peft_type, "target_modules": ["q_proj", "v_proj"], **more}


def ours(row: str, options: Any) -> Any:
    return fastadapt.get_peft_model(base(options), fastadapt.config.from_dict(values(row)))


def theirs(row: str, options: Any) -> Any:
    import peft

    fields = values(row)
    config = getattr(peft, method_of(fields.pop("peft_type")).Config.__name__)
    if "kasa_config" in fields:
        fields["kasa_config"] = peft.KasaConfig(**fields["kasa_config"])
    return peft.get_peft_model(base(options), config(**fields))


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Time over LoRA's and over PEFT's, peak memory over the same."""
    made: dict[str, float] = {}
    mine = found.get("ours")
    for who in ("lora", "peft"):
        other = found.get(who)
        if mine and other:
            # PEFT took part in every other round
            shared = mine["ms"][:: 2 if who == "peft" else 1]
            pairs = zip(shared, other["ms"], strict=True)
            made[f"time/{who}"] = statistics.median(a / b for a, b in pairs)
            made[f"peak/{who}"] = mine["peak_bytes"] / other["peak_bytes"]
    return made


def line(row: str, found: dict[str, Any]) -> str:
    cells = [f"{row:16s}"]
    for who in ("lora", "ours", "peft"):
        got = found.get(who)
        cells.append(f"{who} {statistics.median(got['ms']):8.1f} ms" if got else f"{who} -")
    cells += [f"{name} {ratio:.3f}" for name, ratio in ratios(found).items()]
    return "  ".join(cells + [f"{who}: {why}" for who, why in found.get("reasons", {}).items()])


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="two small layers, one round")
    parser.add_argument("--shapes", choices=SHAPES)
    parser.add_argument("--methods", nargs="*", choices=ROWS, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=4)
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
