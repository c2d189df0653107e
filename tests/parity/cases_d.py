# SPDX-License-Identifier: Apache-2.0
"""Cases of PSOFT, Super-Tuning, OSF, FRoD and AdaMSS."""

from __future__ import annotations

from typing import Any

from tests.parity.cases_a import ALL, ATTENTION, case

ADAMSS = {"r": 12, "num_subspaces": 3, "subspace_rank": 2}

CASES: dict[str, dict[str, Any]] = {
    "psoft": case("PsoftConfig", **ALL, r=8, psoft_alpha=12),
    "psoft-pissa": case(
        "PsoftConfig", **ATTENTION, r=4, ab_svd_init="pissa_init", use_cayley_neumann=True,
        cayley_neumann_eps=0.9, init_weights=False,
    ),
    "psoft-free": case(
        "PsoftConfig", r=4, psoft_orth=False, psoft_mag_a=False, psoft_svd="lowrank",
    ),
    "supertuning": case("SupertuningConfig", **ALL, sparsity=0.9),
    "supra": case(
        "SupertuningConfig", **ATTENTION, r=3, init_weights=False, select_top=False, scale=0.1
    ),
    "osf": case("OSFConfig", scale=0.1, lr=0.01, near=True),
    "osf-rank": case(
        "OSFConfig", target_modules=["q_proj", "up_proj", "down_proj"], effective_rank=10,
        rank_pattern={"up": 0.25}, scale=0.1, lr=0.01, near=True,
    ),
    "frod": case("FrodConfig", progressbar=False),
    "frod-all": case(
        "FrodConfig", **ALL, progressbar=False, init_weights=False, sparse_rate=0.05,
        projection_prng_key=3, scale=0.1,
    ),
    "frod-unsaved": case("FrodConfig", progressbar=False, save_projection=False),
    "adamss": case("AdamssConfig", **ALL, **ADAMSS),
    "adamss-bert": case(
        "AdamssConfig", "bert", **ADAMSS, target_modules=["query", "key"], init_weights=None
    ),
    "adamss-dynamic": case(
        "AdamssConfig", **ATTENTION, **ADAMSS, use_dynamic_rank=True, random_seed=3
    ),
}  # fmt: skip
