# SPDX-License-Identifier: Apache-2.0
"""LoRA files of Kohya's scripts and of diffusers: read into a model, and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastadapt
from fastadapt.adapter_file import open_adapter
from fastadapt.errors import CheckpointError, FastAdaptError, FastAdaptWarning, UnsupportedError
from tests import tiny

WIDTH = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out[0](self.to_q(x).tanh())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention()])
        self.resnets = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(WIDTH, 4, 3, padding=1)})])


class UNet(nn.Module):
    """The names of diffusers' U-Net: an attention and a convolution a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks = nn.ModuleList([Block(), Block()])
        self.mid_block = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(())
        for block in (*self.down_blocks, self.mid_block):
            x = block.attentions[0](x)
            image = x.transpose(1, 2).reshape(1, WIDTH, 2, 2)
            y = y + block.resnets[0]["conv1"](image).sum((2, 3))
        return y


LINEAR = [f"down_blocks.{i}.attentions.0.{n}" for i in (0, 1) for n in ("to_q", "to_out.0")]
CONV = "down_blocks.1.resnets.0.conv1"


def low_rank(path: str, r: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """(down, up) of their own for a layer."""
    draw = torch.Generator().manual_seed(sum(path.encode()))
    if "conv" in path:
        down = torch.randn(r, width, 3, 3, generator=draw)
        return down * 0.2, torch.randn(4, r, 1, 1, generator=draw)
    return torch.randn(r, width, generator=draw), torch.randn(width, r, generator=draw)


def merged(layers: dict[str, tuple[Tensor, Tensor, float]], scale: dict[str, Tensor]) -> Tensor:
    """The output when W' = W + (alpha / r) up down, with DoRA's norm where there is one."""
    model = UNet()
    with torch.no_grad():
        for path, (down, up, alpha) in layers.items():
            w = model.get_submodule(path).weight
            delta = (up.flatten(1) @ down.flatten(1)).view(w.shape)
            new = w + delta * alpha / down.shape[0]
            if path in scale:
                norm = new.flatten(1).norm(dim=1)
                shape = (-1, *[1] * (w.dim() - 1))
                new = new * (scale[path].flatten() / norm).view(shape)
            w.copy_(new)
        return model(inputs())


def inputs() -> Tensor:
    return torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(7))


def kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def original(path: str) -> str:
    """Blocks as the original U-Net numbers them, one resnet a level."""
    named = path.replace(".", "_")
    named = named.replace("down_blocks_0_attentions_0", "input_blocks_1_1")
    named = named.replace("down_blocks_1_attentions_0", "input_blocks_3_1")
    return "lora_unet_" + named.replace(
        "down_blocks_1_resnets_0_conv1", "input_blocks_3_0_in_layers_2"
    )


def processor(path: str) -> str:
    """Of diffusers before its PEFT backend."""
    head, _, leaf = path.partition(".to_")
    return f"unet.{head}.processor.to_{leaf.removesuffix('.0')}_lora"


STEM = kohya(LINEAR[0])

WAYS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "kohya": (kohya, "lora_down.weight", "lora_up.weight"),
    "kohya-original-names": (original, "lora_down.weight", "lora_up.weight"),
    "diffusers": (lambda p: f"unet.{p}", "lora_A.weight", "lora_B.weight"),
    "diffusers-without-component": (lambda p: p, "lora.down.weight", "lora.up.weight"),
    "diffusers-lora": (lambda p: f"unet.{p}", "lora.down.weight", "lora.up.weight"),
    "diffusers-processor": (processor, "down.weight", "up.weight"),
}
"""stem of a path, names of down and up."""


def written(
    way: str, layers: dict[str, tuple[Tensor, Tensor, float]], scale: dict[str, Tensor]
) -> dict[str, Tensor]:
    stem, down, up = WAYS[way]
    tensors = {}
    for path, (a, b, alpha) in layers.items():
        tensors[f"{stem(path)}.{down}"], tensors[f"{stem(path)}.{up}"] = a, b
        if alpha != a.shape[0]:
            tensors[f"{stem(path)}.alpha"] = torch.tensor(alpha)
        if path in scale:
            name = "dora_scale" if "kohya" in way else "lora_magnitude_vector"
            tensors[f"{stem(path)}.{name}"] = scale[path]
    return tensors


def unet() -> UNet:
    model = UNet()
    model.config = {"layers_per_block": 1}
    return model


def loaded(folder: Path, **options: Any) -> Any:
    return fastadapt.PeftModel.from_pretrained(unet(), folder, **options)


def close(model: Any, want: Tensor) -> None:
    with torch.no_grad():
        # float32 sums of at most 72 terms in another order, through three blocks
        torch.testing.assert_close(model(inputs()), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_file_of_another_tool(way: str, dora: bool, tmp_path: Path) -> None:
    """Ranks and alphas differ by layer; a layer without alpha has alpha = r."""
    paths = LINEAR if "diffusers" in way else [*LINEAR, CONV]
    layers = {p: (*low_rank(p, 2 + i % 2), (2.0 + i % 2, 0.5, 3.0)[i % 3])
              for i, p in enumerate(paths)}  # fmt: skip
    scale = {}
    if dora:
        scale = {p: torch.rand(len(b)).view(-1, *[1] * (b.dim() - 1)) + 0.5
                 for p, (_, b, _) in layers.items()}  # fmt: skip
    file = tmp_path / "adapter.safetensors"
    save_file(written(way, layers, scale), file)
    want = merged(layers, scale)
    model = loaded(file)
    close(model, want)
    assert set(model.targeted_module_names) == set(paths)
    again = fastadapt.get_peft_model(unet(), fastadapt.LoraConfig(target_modules=["conv1"]))
    again.load_adapter(file, "other")
    again.set_adapter("other")
    close(again, want)
    assert (want - UNet()(inputs())).abs().max() > 1e-2
    # and what we save of it is PEFT's
    model.save_pretrained(tmp_path / "ours")
    close(loaded(tmp_path / "ours"), want)


def test_the_text_encoder_of_old_diffusers_and_of_kohya(tmp_path: Path) -> None:
    """One file for two models: each takes its own part, and says what it left."""
    path = "layers.0.q_proj"
    a, b = low_rank(path, 2)
    tensors = {
        "lora_te_layers_0_q_proj.lora_down.weight": a,
        "lora_te_layers_0_q_proj.lora_up.weight": b,
        **written("kohya", {LINEAR[0]: (*low_rank(LINEAR[0], 3), 3.0)}, {}),
    }
    save_file(tensors, tmp_path / "kohya.safetensors")
    old = {"text_encoder.layers.0.to_q_lora.down.weight": a,
           "text_encoder.layers.0.to_q_lora.up.weight": b}  # fmt: skip
    save_file(old, tmp_path / "old.safetensors")
    with pytest.warns(FastAdaptWarning, match="left out what is for other models: lora_unet"):
        model = fastadapt.PeftModel.from_pretrained(tiny.Plain(), tmp_path / "kohya.safetensors")
    assert torch.equal(model.base_model.model.layers[0]["q_proj"].lora_B["default"].weight, b)
    with pytest.warns(FastAdaptWarning, match="other models: lora_te"):
        close(loaded(tmp_path / "kohya.safetensors"),
              merged({LINEAR[0]: (*low_rank(LINEAR[0], 3), 3.0)}, {}))  # fmt: skip
    model = fastadapt.PeftModel.from_pretrained(tiny.Plain(), tmp_path / "old.safetensors")
    assert torch.equal(model.base_model.model.layers[0]["q_proj"].lora_A["default"].weight, a)


def test_loha_of_lycoris(tmp_path: Path) -> None:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    parts = {n: low_rank(n, 2)[1 - i % 2].contiguous() for i, n in enumerate(names)}
    tensors = {f"{STEM}.{n}": t for n, t in parts.items()}
    save_file({**tensors, f"{STEM}.alpha": torch.tensor(1.0)}, tmp_path / "l.safetensors")
    model = loaded(tmp_path / "l.safetensors")
    one, two = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
    with torch.no_grad():
        plain = UNet()
        plain.get_submodule(LINEAR[0]).weight += one * two / 2
        close(model, plain(inputs()))


def test_a_folder_as_diffusers_writes_it(tmp_path: Path) -> None:
    """pytorch_lora_weights.safetensors, alpha in the metadata."""
    a, b = low_rank(LINEAR[0], 2)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}
    save_file(written("diffusers", {LINEAR[0]: (a, b, 2.0)}, {}),
              tmp_path / "pytorch_lora_weights.safetensors", metadata=metadata)  # fmt: skip
    close(loaded(tmp_path), merged({LINEAR[0]: (a, b, 6.0)}, {}))
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "mine.safetensors")
    close(loaded(tmp_path, weight_name="mine.safetensors"), merged({LINEAR[0]: (a, b, 6.0)}, {}))


@pytest.mark.parametrize("way", ["kohya", "diffusers"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_written_for_other_tools_and_read_again(way: str, dora: bool, tmp_path: Path) -> None:
    config = fastadapt.LoraConfig(
        r=3, lora_alpha=5, use_dora=dora, use_rslora=True, rank_pattern={"to_q": 2},
        target_modules=["to_q", "to_out.0", "conv1"],
    )  # fmt: skip
    model = fastadapt.get_peft_model(unet(), config)
    tiny.randomise(model)
    if way == "kohya":
        tensors = fastadapt.kohya_state_dict(model)
        assert f"{STEM}.alpha" in tensors
    else:
        tensors = fastadapt.diffusers_state_dict(model)
        assert f"unet.{LINEAR[0]}.lora_A.weight" in tensors
    save_file(tensors, tmp_path / "out.safetensors")
    with torch.no_grad():
        close(loaded(tmp_path / "out.safetensors"), model(inputs()))


TWO = torch.ones(2, 2)
BAD: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "lokr": ({f"{STEM}.lokr_w1": TWO}, "", "lokr_w1"),
    "tucker": ({f"{kohya(CONV)}.lora_mid.weight": TWO}, "", "lora_mid"),
    "no-up": ({}, f"{STEM}.lora_up", "missing"),
    "other-module": ({"lora_unet_x.lora_up.weight": TWO}, "", "unexpected"),
    "some-dora": ({f"{STEM}.dora_scale": torch.ones(8, 1)}, "", "DoRA on 1 of 4 layers"),
    "alpha": ({f"{STEM}.alpha": torch.ones(3)}, "", "one number"),
    "alpha-nan": ({f"{STEM}.alpha": torch.tensor(torch.nan)}, "", "alpha"),
    "input-norm": ({f"{STEM}.dora_scale": torch.ones(1, 8)}, "", "one for each input"),
    "nothing": ({"lora_unet_y.lora_up.weight": TWO}, "lora_unet_down", "no key names a module"),
}
"""What is put in, the keys that are taken out, and what the error says."""


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_error(case: str, tmp_path: Path) -> None:
    layers = {p: (*low_rank(p, 2), 1.0) for p in LINEAR}
    tensors = written("kohya", layers, {})
    more, without, says = BAD[case]
    tensors = {k: v for k, v in tensors.items() if not without or not k.startswith(without)}
    tensors |= more
    save_file(tensors, tmp_path / "bad.safetensors")
    model = unet()
    before = tiny.snapshot(model)
    with pytest.raises(FastAdaptError, match=says) as caught:
        fastadapt.PeftModel.from_pretrained(model, tmp_path / "bad.safetensors")
    assert isinstance(caught.value, CheckpointError | UnsupportedError)
    tiny.assert_same(model, before)


def test_without_a_model_the_keys_say_nothing(tmp_path: Path) -> None:
    save_file(
        written("kohya", {LINEAR[0]: (*low_rank("x", 2), 1.0)}, {}), tmp_path / "k.safetensors"
    )
    with pytest.raises(CheckpointError, match="another tool's"):
        open_adapter(tmp_path / "k.safetensors")
