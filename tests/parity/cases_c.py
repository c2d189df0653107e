# SPDX-License-Identifier: Apache-2.0
"""Cases of OFT, HRA, BOFT, RoAd, SHiRA, DeLoRA, GraLoRA, BEFT, DEFT, GLoRA, PEANuT and Lily."""

from __future__ import annotations

from typing import Any

ALL = {"target_modules": "all-linear"}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


def case(config: str, model: str = "llama", **options: Any) -> dict[str, Any]:
    made = {k: options.pop(k) for k in ("nf4", "scale", "lr", "skip", "near") if k in options}
    return {"peft": config, "ours": config, "model": model, "kwargs": options, **made}


CASES: dict[str, dict[str, Any]] = {
    "oft": case("OFTConfig", **ALL, nf4=True),
    "oft-cayley": case("OFTConfig", **ALL, use_cayley_neumann=False, oft_block_size=8),
    "oft-terms": case("OFTConfig", **ATTENTION, num_cayley_neumann_terms=7, oft_block_size=16),
    "oft-blocks": case("OFTConfig", **ATTENTION, r=6, oft_block_size=0, init_weights=False),
    "oft-shared": case("OFTConfig", **ALL, block_share=True, oft_block_size=16),
    "coft": case("OFTConfig", **ALL, coft=True, eps=0.5),
    "oft-embedding": case("OFTConfig", target_modules=["embed_tokens", "v_proj"]),
    "oft-conv": case(
        "OFTConfig",
        "conv",
        target_modules=["point", "head"],
        oft_block_size=4,
        bias="oft_only",
    ),
    "hra": case("HRAConfig", **ALL),
    "hra-odd": case("HRAConfig", **ATTENTION, r=5),
    "hra-gs": case("HRAConfig", **ALL, apply_GS=True, init_weights=False, r=6),
    "hra-conv": case("HRAConfig", "conv", target_modules=["first", "point", "head"], r=4),
    "boft": case("BOFTConfig", **ALL),
    "boft-num": case(
        "BOFTConfig", **ATTENTION, boft_block_size=0, boft_block_num=4, init_weights=False
    ),
    "boft-conv": case(
        "BOFTConfig", "conv", target_modules=["first", "point", "head"], bias="boft_only"
    ),
    "road": case("RoadConfig", **ALL, group_size=16, nf4=True),
    "road-2": case("RoadConfig", **ALL, group_size=8, variant="road_2", init_weights=False),
    "road-4": case("RoadConfig", "bert", target_modules=["query", "key"], variant="road_4"),
    "shira": case("ShiraConfig", **ALL, r=4, nf4=True),
    "shira-seed": case("ShiraConfig", **ATTENTION, r=2, random_seed=5, init_weights=False),
    "delora": case("DeloraConfig", **ALL),
    "delora-random": case(
        "DeloraConfig",
        **ALL,
        init_weights=False,
        rank_pattern={"q_proj": 3},
        lambda_pattern={"v_proj": 2},
    ),
    "gralora": case("GraloraConfig", **ALL, r=8, alpha=4),
    "gralora-4": case("GraloraConfig", **ALL, r=8, alpha=4, gralora_k=4, init_weights=False),
    "gralora-hybrid": case("GraloraConfig", **ATTENTION, r=8, alpha=8, hybrid_r=3, gralora_k=2),
    "gralora-gpt2": case("GraloraConfig", "gpt2", r=4, alpha=4, fan_in_fan_out=True),
    "beft": case("BeftConfig", skip={"merge": "PEFT cannot merge into a layer that has no bias"}),
    "beft-bert": case("BeftConfig", "bert", init_weights=False, nf4=False),
    "deft": case("DeftConfig", **ALL, near=True),
    "deft-qr": case("DeftConfig", **ALL, decomposition_method="qr", alpha=4, near=True),
    "deft-random": case("DeftConfig", **ATTENTION, init_weights=False, init_scale=2.0),
    "para": case("DeftConfig", **ATTENTION, para=True, r=4),
    "deft-gpt2": case("DeftConfig", "gpt2", fan_in_fan_out=True, near=True),
    "glora": case("GloraConfig", **ALL, r=4),
    "glora-bert": case("GloraConfig", "bert", target_modules=["query", "key"], init_weights=False),
    "glora-vector": case(
        "GloraConfig",
        "bert",
        target_modules=["query", "key"],
        config_A_B="vector",
        config_C="vector",
        config_D_E="vector",
        init_weights=False,
    ),
    "glora-constant": case("GloraConfig", **ALL, config_A_B="constant", scale=0.05, lr=1e-5),
    "peanut": case("PeanutConfig", **ALL, r=4),
    "peanut-deep": case(
        "PeanutConfig", **ATTENTION, r=4, depth=2, act_fn="gelu", scaling=0.5, init_weights=False
    ),
    "lily": case("LilyConfig", **ALL, r=4, skip={"merge": "the update depends on the input"}),
    "lily-stride": case(
        "LilyConfig",
        **ATTENTION,
        r=4,
        stride_A=2,
        num_B=3,
        scaling=0.5,
        init_weights=False,
        skip={"merge": "the update depends on the input"},
    ),
}
