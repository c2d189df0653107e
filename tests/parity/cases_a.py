# SPDX-License-Identifier: Apache-2.0
"""Cases of IA3, LoHa, LoKr, AdaLoRA, HiRA, MiSS, LoRA on convolutions and LN tuning."""

from __future__ import annotations

from typing import Any

ALL = {"target_modules": "all-linear"}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
CONVS = {"target_modules": ["first", "point", "grouped", "head"]}
NO_FEEDFORWARD = {"feedforward_modules": []}
_OPTIONS = ("nf4", "scale", "lr", "skip", "near", "extra", "missing")


def case(config: str, model: str = "llama", **options: Any) -> dict[str, Any]:
    made = {k: options.pop(k) for k in _OPTIONS if k in options}
    return {"peft": config, "ours": config, "model": model, "kwargs": options, **made}


CASES: dict[str, dict[str, Any]] = {
    "lora": case("LoraConfig", **ALL, nf4=True),
    "ia3": case("IA3Config", nf4=True),
    "ia3-random": case("IA3Config", **ALL, **NO_FEEDFORWARD, init_ia3_weights=False),
    "ia3-names": case(
        "IA3Config", target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]
    ),
    "ia3-gpt2": case("IA3Config", "gpt2"),
    "ia3-conv": case("IA3Config", "conv", **CONVS, feedforward_modules=["point", "head"]),
    "loha": case("LoHaConfig", **ALL),
    "loha-small": case("LoHaConfig", **ALL, r=3, alpha=5, rank_pattern={"q_proj": 2}),
    "loha-random": case("LoHaConfig", **ATTENTION, init_weights=False),
    "loha-conv": case("LoHaConfig", "conv", target_modules=["first", "point", "grouped", "flat"]),
    "loha-conv-core": case(
        "LoHaConfig",
        "conv",
        target_modules=["first", "point", "grouped", "flat"],
        use_effective_conv2d=True,
        r=4,
        scale=1.0,
        skip={"steps": "PEFT's gradients of w1_a and w2_a take the other factor's core"},
    ),
    "lokr": case("LoKrConfig", **ALL),
    "lokr-both": case("LoKrConfig", **ALL, r=2, decompose_both=True, alpha_pattern={"v_proj": 3}),
    "lokr-factor": case("LoKrConfig", **ALL, decompose_factor=4, init_weights="lycoris"),
    "lokr-random": case("LoKrConfig", **ATTENTION, r=2, init_weights=False),
    "lokr-conv": case(
        "LoKrConfig", "conv", target_modules=["first", "point", "grouped", "flat"], scale=1.0
    ),
    "lokr-conv-core": case(
        "LoKrConfig",
        "conv",
        target_modules=["first", "grouped"],
        scale=1.0,
        lr=0.01,
        use_effective_conv2d=True,
        r=1,
        init_weights="lycoris",
    ),
    "lora-conv": case("LoraConfig", "conv", target_modules=["first", "point", "flat", "head"]),
    "lora-conv-groups": case(
        "LoraConfig",
        "conv",
        target_modules=["grouped"],
        lora_bias=True,
        skip={"merge": "the update of PEFT's grouped pair is not a grouped weight"},
    ),
    "dora-conv": case(
        "LoraConfig", "conv", target_modules=["first", "point", "flat", "head"], use_dora=True
    ),
    "adalora": case("AdaLoraConfig", **ALL, total_step=10, nf4=True, extra=["ranknum"]),
    "adalora-random": case(
        "AdaLoraConfig",
        **ATTENTION,
        total_step=10,
        init_r=4,
        lora_alpha=3,
        init_lora_weights=False,
        extra=["ranknum"],
    ),
    "adalora-gpt2": case("AdaLoraConfig", "gpt2", total_step=10, extra=["ranknum"]),
    "adalora-conv": case(
        "AdaLoraConfig",
        "conv",
        target_modules=["first", "point", "head"],
        total_step=10,
        scale=1.0,
        extra=["ranknum"],
    ),
    "hira": case("HiraConfig", **ALL, r=4),
    "hira-random": case("HiraConfig", **ATTENTION, r=3, init_weights="gaussian"),
    "hira-gpt2": case("HiraConfig", "gpt2"),
    "hira-embedding": case("HiraConfig", target_modules=["embed_tokens", "q_proj"]),
    "hira-conv": case("HiraConfig", "conv", target_modules=["first", "point", "flat", "head"]),
    "miss": case("MissConfig", **ALL, r=8, nf4=True),
    "miss-odd": case("MissConfig", **ATTENTION, r=7, init_weights=False),
    # (steps of 0.1 leave PEFT 1e-3 from its own float64)
    "miss-mini": case("MissConfig", **ALL, r=8, mini_r=4, init_weights="mini", lr=3e-3),
    "miss-bat": case("MissConfig", **ALL, r=8, init_weights="bat", scale=0.1),
    "ln-tuning": case("LNTuningConfig"),
    "ln-tuning-gpt2": case("LNTuningConfig", "gpt2"),
    "ln-tuning-layers": case(
        "LNTuningConfig", target_modules=["norm", "q_proj", "embed_tokens"], scale=0.1
    ),
    "ln-tuning-conv": case("LNTuningConfig", "conv", target_modules=["first", "grouped", "flat"]),
}
