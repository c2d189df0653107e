# SPDX-License-Identifier: Apache-2.0
"""Make the golden adapters again: files of old PEFT releases, and the outputs that those gave.

    python tests/golden/make.py        all releases, each from the registry in a folder of its own
    python tests/golden/make.py here   the peft that can be imported, into tests/golden/<version>

A release is laid over the present torch and transformers, with the packages that ``BESIDE`` names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
VERSIONS = ("0.5.0", "0.6.2", "0.8.2", "0.10.0", "0.11.1", "0.13.2", "0.15.2", "0.17.1")
BESIDE = {"0.17.1": ("transformers==4.56.2", "huggingface_hub==0.36.0", "tokenizers==0.22.1")}
"""Its own imports need a transformers of its time."""

LINEAR = ["up", "down"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 2, "lora_alpha": 3, "target_modules": LINEAR}),
    "embedding": ("LoraConfig", {"r": 2, "target_modules": ["tokens", "up"]}),
    "saved": ("LoraConfig", {"r": 2, "target_modules": ["up"], "modules_to_save": ["head"]}),
    "pattern": ("LoraConfig", {"r": 2, "target_modules": LINEAR, "rank_pattern": {"down": 3},
                               "alpha_pattern": {"down": 5}}),
    "rslora": ("LoraConfig", {"r": 2, "target_modules": LINEAR, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 2, "target_modules": LINEAR, "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": LINEAR, "feedforward_modules": ["down"]}),
    "loha": ("LoHaConfig", {"r": 2, "target_modules": LINEAR}),
    "lokr": ("LoKrConfig", {"r": 2, "target_modules": LINEAR}),
    "boft": ("BOFTConfig", {"boft_block_size": 2, "target_modules": LINEAR}),
    "vera": ("VeraConfig", {"r": 2, "target_modules": ["up"], "projection_prng_key": 1}),
    "hra": ("HRAConfig", {"r": 2, "target_modules": LINEAR}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 9, "target_modules": LINEAR}),
    "bone": ("BoneConfig", {"r": 2, "target_modules": LINEAR}),
    "lora_bias": ("LoraConfig", {"r": 2, "target_modules": LINEAR, "lora_bias": True}),
    "tokens": ("LoraConfig", {"r": 2, "target_modules": ["up"],
                              "trainable_token_indices": {"tokens": [2, 5]}}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "r": 0, "use_cayley_neumann": False,
                          "target_modules": LINEAR}),
    "road": ("RoadConfig", {"group_size": 4, "target_modules": LINEAR}),
    "shira": ("ShiraConfig", {"r": 1, "random_seed": 3, "target_modules": LINEAR}),
    "c3a": ("C3AConfig", {"block_size": 4, "target_modules": LINEAR}),
    "miss": ("MissConfig", {"r": 2, "target_modules": LINEAR}),
    "randlora": ("RandLoraConfig", {"r": 2, "target_modules": ["up"]}),
}  # fmt: skip


class Tiny(nn.Module):
    """An embedding, two linear layers and a head, with weights from a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up = nn.Embedding(11, 8), nn.Linear(8, 12)
        self.down, self.head = nn.Linear(12, 8), nn.Linear(8, 3)
        for i, parameter in enumerate(self.parameters()):
            parameter.data.copy_(wave(parameter, i))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.head(x + self.down(self.up(x).tanh()))  # type: ignore[no-any-return]


def wave(like: Tensor, phase: int) -> Tensor:
    """Values that no generator has to give again."""
    at = torch.arange(like.numel(), dtype=torch.float64)
    return (0.5 * torch.sin(at * 1.7 + phase)).view(like.shape).to(like.dtype)


def inputs() -> Tensor:
    return torch.arange(11).view(1, 11)


def make(folder: Path) -> None:
    """The files of every case that the importable peft knows."""
    import peft
    from safetensors.torch import save_file

    for name, (cls, fields) in CASES.items():
        config = getattr(peft, cls, None)
        if config is None or not all(hasattr(config, field) or field in
                                     config.__dataclass_fields__ for field in fields):  # fmt: skip
            continue
        model = peft.PeftModel(Tiny(), config(**fields))
        trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
        for i, parameter in enumerate(trained):
            # about the start, so that a magnitude stays one
            parameter.data.add_(wave(parameter, i) * 0.5)
        model.eval().save_pretrained(folder / name, safe_serialization=True)
        with torch.no_grad():
            save_file({"output": model(inputs())}, folder / name / "output.safetensors")
        (folder / name / "README.md").unlink(missing_ok=True)


def main() -> None:
    if sys.argv[1:] == ["here"]:
        import importlib.metadata

        make(HERE / importlib.metadata.version("peft"))
        return
    for version in VERSIONS:
        with tempfile.TemporaryDirectory() as where:
            pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", where]
            subprocess.run([*pip, f"peft=={version}", *BESIDE.get(version, ())], check=True)
            environment = {**os.environ, "PYTHONPATH": where}
            subprocess.run([sys.executable, __file__, "here"], check=True, env=environment)


if __name__ == "__main__":
    main()
