# SPDX-License-Identifier: Apache-2.0
"""Cases of VeRA, VB-LoRA, FourierFT, RandLoRA, C3A, PVeRA, UniLoRA, TinyLoRA and WaveFT."""

from __future__ import annotations

from typing import Any

from tests.parity.cases_a import ALL, case

BANK = {"num_vectors": 20, "vector_length": 8}
RAND = {"randlora_alpha": 8, "missing": "PEFT repeats the projections below each layer; we do not"}

CASES: dict[str, dict[str, Any]] = {
    "vera": case("VeraConfig", r=8, nf4=True),
    "vera-all": case("VeraConfig", **ALL, r=8, projection_prng_key=3, d_initial=0.2),
    "vera-unsaved": case("VeraConfig", r=8, save_projection=False),
    "vera-random": case("VeraConfig", **ALL, r=8, init_weights=False),
    "vera-gpt2": case("VeraConfig", "gpt2", r=8, bias="vera_only"),
    "vblora": case("VBLoRAConfig", **BANK, nf4=True),
    "vblora-all": case("VBLoRAConfig", **ALL, **BANK, topk=3),
    "vblora-topk": case("VBLoRAConfig", **BANK, save_only_topk_weights=True),
    "vblora-gpt2": case("VBLoRAConfig", "gpt2", **BANK),
    "fourierft": case("FourierFTConfig", n_frequency=40, nf4=True),
    "fourierft-all": case(
        "FourierFTConfig",
        **ALL,
        n_frequency=40,
        n_frequency_pattern={"up_proj": 90},
        init_weights=True,
        random_loc_seed=3,
    ),
    "fourierft-gpt2": case("FourierFTConfig", "gpt2", n_frequency=40),
    "randlora": case("RandLoraConfig", r=6, nf4=True, **RAND),
    "randlora-all": case("RandLoraConfig", **ALL, r=8, projection_prng_key=3, **RAND),
    "randlora-sparse": case("RandLoraConfig", r=8, sparse=True, **RAND),
    "randlora-very-sparse": case("RandLoraConfig", r=8, very_sparse=True, **RAND),
    "randlora-unsaved": case("RandLoraConfig", r=8, save_projection=False, **RAND),
    "randlora-random": case("RandLoraConfig", r=8, init_weights=False, **RAND),
    "randlora-gpt2": case("RandLoraConfig", "gpt2", r=8, **RAND),
    "c3a": case("C3AConfig", block_size=8, nf4=True),
    "c3a-all": case(
        "C3AConfig", **ALL, block_size=16, block_size_pattern={"o_proj": 4}, init_weights=True
    ),
    "c3a-gaussian": case("C3AConfig", block_size=8, init_weights="gaussian"),
    "c3a-kaiming": case("C3AConfig", block_size=8, init_weights="kaiming_uniform"),
    "pvera": case("PveraConfig", r=8, nf4=True),
    "pvera-all": case("PveraConfig", **ALL, r=8, generator_seed=3),
    "pvera-unsaved": case("PveraConfig", r=8, save_projection=False),
    "pvera-gpt2": case("PveraConfig", "gpt2", r=8),
    "unilora": case("UniLoraConfig", theta_d_length=50),
    "unilora-all": case("UniLoraConfig", **ALL, r=3, proj_seed=3, save_indices=True),
    "unilora-random": case("UniLoraConfig", init_weights=False),
    "unilora-gpt2": case("UniLoraConfig", "gpt2"),
    "tinylora": case("TinyLoraConfig", u=16),
    "tinylora-all": case(
        "TinyLoraConfig", **ALL, r=3, weight_tying=0.8, init_weights="uniform", projection_seed=3
    ),
    "tinylora-unsaved": case("TinyLoraConfig", save_projection=False),
    "tinylora-gpt2": case("TinyLoraConfig", "gpt2"),
    "waveft": case("WaveFTConfig", n_frequency=40, nf4=True),
    "waveft-all": case(
        "WaveFTConfig",
        **ALL,
        n_frequency=40,
        n_frequency_pattern={"up_proj": 90},
        wavelet_family="db4",
        init_weights=False,
        random_loc_seed=3,
        lr=1e-3,
        scaling=5.0,
    ),
    "waveft-sym": case("WaveFTConfig", **ALL, n_frequency=40, wavelet_family="sym6", lr=1e-3),
    "waveft-coif": case(
        "WaveFTConfig",
        **ALL,
        n_frequency=40,
        wavelet_family="coif2",
        proportional_parameters=True,
        lr=1e-3,
    ),
    "waveft-plain": case("WaveFTConfig", n_frequency=40, use_idwt=False),
    "waveft-gpt2": case("WaveFTConfig", "gpt2", n_frequency=40),
    "tinylora-embedding": case("TinyLoraConfig", target_modules=["embed_tokens", "q_proj"]),
}
