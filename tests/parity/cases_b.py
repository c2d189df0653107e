# SPDX-License-Identifier: Apache-2.0
"""Cases of VeRA, VB-LoRA, FourierFT, RandLoRA, C3A, PVeRA, UniLoRA, TinyLoRA and WaveFT."""

from __future__ import annotations

from typing import Any

from tests.parity.cases_a import ALL, case

CASES: dict[str, dict[str, Any]] = {
    "vera": case("VeraConfig", r=8, nf4=True),
    "vera-all": case("VeraConfig", **ALL, r=8, projection_prng_key=3, d_initial=0.2),
    "vera-unsaved": case("VeraConfig", r=8, save_projection=False),
    "vera-random": case("VeraConfig", **ALL, r=8, init_weights=False),
    "vera-gpt2": case("VeraConfig", "gpt2", r=8, bias="vera_only"),
}
