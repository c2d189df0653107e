# SPDX-License-Identifier: Apache-2.0
"""One training step on NF4, in interleaved rounds: fastadapt, PEFT + bitsandbytes, no adapters.

A step is forward, loss, backward, AdamW. The contenders take turns in one process (A B C A B C),
so that what disturbs the machine disturbs all. No ratio is printed unless the numbers agree first:
with the same adapters and no dropout, our logits and gradients may be twice as far from those of a
dequantised model in a wider dtype as PEFT's are.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from report import machine, show
from torch import Tensor, nn

import fastadapt
from fastadapt.ops.precision import product_dtype

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-8": {
        "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152, "num_hidden_layers": 8,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256, "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "llama-8b-4": {
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "num_hidden_layers": 4,
    },
}  # fmt: skip
SHAPES["smollm2"] = {**SHAPES["smollm2-8"], "num_hidden_layers": 30}
LORA = {
    "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}  # fmt: skip
OURS, RIVAL = "fastadapt", "PEFT + bitsandbytes"


@dataclass
class Contender:
    """A model and what was measured of it; seconds and bytes are raw samples."""

    model: Any
    optimizer: torch.optim.Optimizer | None = None
    seconds: list[float] = field(default_factory=list)
    saved_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: int | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="smollm2-8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of what is not quantised; auto: bfloat16 where the device has it",
    )  # fmt: skip
    parser.add_argument(
        "--compute", choices=["float32", "bfloat16"], default="bfloat16",
        help="bnb_4bit_compute_dtype of all; float32 helps bitsandbytes where bf16 is emulated",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/train.json"))
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device(args.device)
    dtype = product_dtype(torch.bfloat16, device)
    dtype = dtype if args.dtype == "auto" else getattr(torch, args.dtype)

    contenders, oracle = build(args.shapes, dtype, getattr(torch, args.compute), device)
    batch = tokens(SHAPES[args.shapes]["vocab_size"], args.batch, args.length, device)
    agreed, parity = compare(contenders[OURS].model, contenders[RIVAL].model, oracle, batch)
    del oracle
    if not agreed:
        print(f"parity failed, nothing is compared: {json.dumps(parity)}", file=sys.stderr)
        return 1
    for contender in contenders.values():
        contender.saved_bytes = saved_for_backward(contender.model, batch)
    measure(contenders, batch, args.rounds)

    document = {
        "shapes": {"name": args.shapes, **SHAPES[args.shapes]},
        "tokens": [args.batch, args.length],
        "dtype": str(dtype).removeprefix("torch."),
        "compute": args.compute,
        "autocast": device.type == "cuda",
        "lora": LORA,
        "parity": parity,
        "contenders": {name: summary(c) for name, c in contenders.items()},
        "implementations": fastadapt.explain(
            contenders[OURS].model, tokens=args.batch * args.length
        ).implementations(),
        "machine": {**machine(device), "load_average_before": load_before},
    }
    show(document, RIVAL)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written: {args.out}")
    return 0


def build(
    shapes: str, dtype: torch.dtype, compute: torch.dtype, device: torch.device
) -> tuple[dict[str, Contender], nn.Module]:
    """The contenders over equal bases, and the oracle: PEFT over the dequantised base, in a wider
    dtype than the contenders compute in."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**SHAPES[shapes])).save_pretrained(folder)
        quantised = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            ),
        )  # fmt: skip
    quantised.config.use_cache = False
    quantised.requires_grad_(False)
    dense = dequantised(quantised, dtype)

    rival = peft.get_peft_model(copy.deepcopy(quantised), peft.LoraConfig(**LORA))
    adapters = adapter_parameters(rival)
    with torch.no_grad():
        for name, parameter in adapters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    ours = fastadapt.patch(copy.deepcopy(quantised), fastadapt.LoraConfig(**LORA))
    exact = torch.float64 if compute == torch.float32 else torch.float32
    oracle = peft.get_peft_model(copy.deepcopy(dense).to(exact), peft.LoraConfig(**LORA))
    for model in (ours, oracle):
        found = adapter_parameters(model)
        with torch.no_grad():
            for name, parameter in adapters.items():
                found[name].copy_(parameter)
    for model in (quantised, dense):
        model.enable_input_require_grads()  # a frozen model has no other reason to go backward
    contenders = {
        OURS: Contender(ours),
        RIVAL: Contender(rival),
        "no adapters, bitsandbytes": Contender(quantised),
        "no adapters, dense": Contender(dense),
    }
    for contender in contenders.values():
        contender.model.train()
        trained = [p for p in contender.model.parameters() if p.requires_grad]
        contender.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    return contenders, oracle.train()


def dequantised(model: Any, dtype: torch.dtype) -> Any:
    """The same model with plain linear layers."""
    from bitsandbytes.functional import dequantize_4bit

    plain = copy.deepcopy(model)
    for path, layer in list(plain.named_modules()):
        if type(layer).__name__ != "Linear4bit":
            continue
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        parent, _, name = path.rpartition(".")
        setattr(plain.get_submodule(parent), name, linear)
    for mark in ("is_quantized", "is_loaded_in_4bit"):
        setattr(plain, mark, False)
    plain.quantization_method = None  # with it, transformers refuses to change the dtype
    return plain


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By the names that fastadapt and PEFT share."""
    prefix = "base_model.model."
    found = ((n.removeprefix(prefix), p) for n, p in model.named_parameters() if ".lora_" in n)
    return dict(sorted(found))


def tokens(vocabulary: int, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def precision(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """What Trainer does: bf16 autocast on a GPU, none on a CPU."""
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, torch.bfloat16) if kind == "cuda" else contextlib.nullcontext()


def forward_backward(model: Any, batch: dict[str, Tensor]) -> Any:
    with precision(model):
        out = model(**batch)
    out.loss.backward()
    return out


def compare(
    ours: nn.Module, rival: nn.Module, oracle: nn.Module, batch: dict[str, Tensor]
) -> tuple[bool, dict[str, Any]]:
    """Logits and adapter gradients without dropout, against the oracle: ours may err by twice
    what the rival errs (the worst relative error over all tensors)."""

    def run(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
        with no_dropout(model):
            out = forward_backward(model, batch)
        grads = {n: p.grad.double() for n, p in adapter_parameters(model).items()}  # type: ignore[union-attr]
        model.zero_grad(set_to_none=True)
        return out.loss.item(), {"logits": out.logits.detach().double(), **grads}

    exact_loss, exact = run(oracle)
    found: dict[str, Any] = {"loss": {"dequantised, wider": exact_loss}, "worst_error": {}}
    for name, model in ((OURS, ours), (RIVAL, rival)):
        found["loss"][name], got = run(model)
        found["worst_error"][name] = max(
            float((got[key] - value).norm() / value.norm()) for key, value in exact.items()
        )
    agreed = found["worst_error"][OURS] <= 2 * found["worst_error"][RIVAL]
    return agreed, found


@contextlib.contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    layers = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p


def saved_for_backward(model: Any, batch: dict[str, Tensor]) -> dict[str, int]:
    """Bytes that the graph holds after the forward pass: unique storages, without the model's own.

    layers: of the decoder alone; step: with the head and the loss."""
    own = {t.untyped_storage().data_ptr() for t in model_tensors(model)}
    decoder = next(
        m for n, m in model.named_modules() if n.rpartition(".")[2] == "layers"
    ).__class__
    backbone = next(m for m in model.modules() if hasattr(m, "embed_tokens"))
    if decoder is not nn.ModuleList:
        raise RuntimeError(f"expected the decoder's layers in a ModuleList, got {decoder}")
    ways: dict[str, Callable[[], Any]] = {
        "layers": lambda: backbone(input_ids=batch["input_ids"]),
        "step": lambda: model(**batch),
    }
    counted = {}
    for name, call in ways.items():
        held: dict[int, Tensor] = {}

        def pack(tensor: Tensor, held: dict[int, Tensor] = held) -> Tensor:
            held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), precision(model):
            out = call()
        counted[name] = sum(
            t.untyped_storage().nbytes() for key, t in held.items() if key not in own
        )
        del out
    return counted


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for value in vars(part).values() if part is not None else ():
                if isinstance(value, Tensor):
                    yield value


def measure(contenders: dict[str, Contender], batch: dict[str, Tensor], rounds: int) -> None:
    """One warm-up step each, then ``rounds`` rounds in which each takes one step."""
    gpu = batch["input_ids"].is_cuda
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            forward_backward(contender.model, batch)
            if contender.optimizer is not None:
                contender.optimizer.step()
                contender.optimizer.zero_grad(set_to_none=True)
            if gpu:
                torch.cuda.synchronize()
                contender.peak_bytes = torch.cuda.max_memory_allocated()
            seconds = time.perf_counter() - start
            print(f"  round {turn or 'warm-up'}: {name} {seconds:.3f} s", flush=True)
            if turn:
                contender.seconds.append(seconds)


def summary(contender: Contender) -> dict[str, Any]:
    samples = contender.seconds
    quarters = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else None
    return {
        "median_seconds": statistics.median(samples),
        "iqr_seconds": quarters[2] - quarters[0] if quarters else None,
        "samples_seconds": samples,
        "saved_for_backward_bytes": contender.saved_bytes,
        "peak_cuda_bytes": contender.peak_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
