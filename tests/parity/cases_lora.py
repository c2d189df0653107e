# SPDX-License-Identifier: Apache-2.0
"""Cases of LoRA's starts and variants."""

from __future__ import annotations

from typing import Any

from tests.parity.cases_c import ALL, ATTENTION


def case(model: str = "llama", **options: Any) -> dict[str, Any]:
    made = {k: options.pop(k) for k in ("nf4", "scale", "lr", "skip", "near") if k in options}
    return {
        "peft": "LoraConfig", "ours": "LoraConfig", "model": model,
        "kwargs": {"r": 4, "lora_alpha": 6, **options}, **made,
    }  # fmt: skip


BLOCKS = {"target_modules_bd_a": ["v_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
RANDOM = {"init_type": "random", "num_groups": 7}

CASES: dict[str, dict[str, Any]] = {
    "pissa": case(**ALL, init_lora_weights="pissa", near=True),
    "pissa-gpt2": case("gpt2", init_lora_weights="pissa", fan_in_fan_out=True, near=True),
    "pissa-dora": case(**ATTENTION, init_lora_weights="pissa", use_dora=True, near=True),
    "olora": case(**ALL, init_lora_weights="olora", near=True),
    "orthogonal": case(**ALL, init_lora_weights="orthogonal"),
    "mica": case(
        target_modules=["q_proj", "embed_tokens"], init_lora_weights="mica", near=True,
        skip={"start": "a frozen B counts among the base's parameters there"},
    ),
    "bdlora": case(**ATTENTION, use_bdlora=BLOCKS),
    "kasa": case(
        **ALL, kasa_config={}, near=True,
        skip={
            "start": "PEFT changes the base, here the adapter holds what was taken out",
            "to_peft": "the parts that are not saved are there made again from the base",
        },
    ),
    "experts": case("experts", target_parameters=["up", "down"], target_modules=[], r=2),
    "expert-modules": case(
        "experts", target_parameters=["blocks.0.gate", "1.down"], target_modules=["post"],
        rank_pattern={"down": 3}, use_rslora=True,
        skip={"merge": "PEFT leaves the adapters of layers inside of such a module there"},
    ),
    "mha": case(
        "attention", target_modules=["mha", "head"], use_rslora=True,
        skip={
            "start": "PEFT registers in_proj_weight anew, behind the bias; values: test_attention",
            "steps": "PEFT applies out_proj's update twice and differentiates it once",
        },
    ),
    "velora": case(**ALL, velora_config={"num_groups": 16}),
    "monteclora": case(
        **ATTENTION, monteclora_config={},
        skip={
            "start": "the samplers' start values are drawn in another order",
            "steps": "the noise of each step is drawn in another order",
        },
    ),
    "velora-random": case(**ATTENTION, velora_config=RANDOM, skip={"steps": "e is a buffer there"}),
}  # fmt: skip
