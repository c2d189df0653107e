# SPDX-License-Identifier: Apache-2.0
"""Training runs on a tiny model: what they leave, how they stop and resume, what they refuse."""

from __future__ import annotations

import io
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastadapt.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FastAdaptError,
    OutputError,
    TargetError,
)
from fastadapt.patch.fit import Interrupted
from fastadapt.patch.settings import TrainSettings, read_yaml
from fastadapt.patch.train import run

LAYERS = 2 * 7
"""Linears of the tiny model: q, k, v, o, gate, up, down, twice."""


@pytest.fixture
def settings(chat_model: Path, chat_data: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings(
        model=str(chat_model), data=str(chat_data), out=str(tmp_path / "out"), r=4, alpha=8,
        steps=16, max_length=128, lr=1e-2, seed=3, plot=False,
    )  # fmt: skip


class InterruptAt(io.StringIO):
    """A screen on which a line with some text presses Ctrl-C."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def write(self, text: str) -> int:
        if self.text in text:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def console(screen: io.StringIO | None = None) -> Console:
    return Console(file=screen or io.StringIO(), width=100)


def tensors(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(Path(folder) / "adapter_model.safetensors"))


def test_a_run_leaves_its_files_and_its_report(settings: TrainSettings) -> None:
    report = run(replace(settings, plot=True, ask="what is 3?", eval_fraction=0.2), console())
    out = Path(settings.out)
    assert {path.name for path in out.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "report.json", "loss.png",
    }  # fmt: skip
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    assert len(report["loss"]) == len(report["step_seconds"]) == 16
    assert report["loss"][-1] < report["loss"][0]
    assert sum(report["kernels"].values()) == LAYERS
    stored = sum(tensor.numel() for tensor in tensors(settings.out).values())
    assert report["trainable_parameters"] == stored
    assert [row["step"] for row in report["eval_loss"]] == [16]
    assert report["seed"] == 3
    assert report["peak_rss_mib"] > 0
    assert report["tokens_per_second"] > 0


def test_the_saved_adapter_answers_as_the_trained_model_did(settings: TrainSettings) -> None:
    import fastadapt
    from fastadapt.patch.loading import load_model, load_tokenizer
    from fastadapt.patch.train import answer

    asked = replace(settings, ask="what is 3?")
    report = run(asked, console())
    assert report["answers"]["before"] != report["answers"]["after"]
    model = fastadapt.PeftModel.from_pretrained(load_model(settings.model), settings.out)
    again = answer(model, load_tokenizer(settings.model), asked)
    assert again == report["answers"]["after"]


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (5, {}),
        (12, {}),  # 24 examples in batches of 2: the end of the first epoch
        (14, {}),
        (4, {"accumulate": 2, "steps": 8}),
        (6, {"method": "dora", "gradient_checkpointing": True}),
    ],
    ids=["inside", "epoch-end", "second-epoch", "accumulate", "dora-checkpointing"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    settings: TrainSettings, tmp_path: Path, step: int, more: dict[str, Any]
) -> None:
    whole = replace(settings, **more)
    expected = run(whole, console())
    parts = replace(whole, out=str(tmp_path / "parts"))
    with pytest.raises(Interrupted, match="--resume") as stop:
        run(parts, console(InterruptAt(f"step {step - 1}/")))
    assert (stop.value.step, stop.value.total) == (step, whole.steps)
    assert stop.value.checkpoint.is_dir()
    assert not (Path(parts.out) / "adapter_model.safetensors").exists()
    report = run(replace(parts, resume=True), console())
    assert report["resumed_from_step"] == step
    assert len(report["step_seconds"]) == whole.steps - step
    assert report["loss"] == expected["loss"]
    one, two = tensors(whole.out), tensors(parts.out)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list(Path(parts.out).glob("checkpoint-*")), "an interrupted run's are removed"


def test_periodic_checkpoints_stay(settings: TrainSettings) -> None:
    run(replace(settings, steps=5, save_steps=2), console())
    names = {path.name for path in Path(settings.out).glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}


def test_an_incomplete_checkpoint_is_passed_over(settings: TrainSettings, tmp_path: Path) -> None:
    expected = run(replace(settings, out=str(tmp_path / "whole")), console())
    with pytest.raises(Interrupted):
        run(settings, console(InterruptAt("step 5/")))
    broken = Path(settings.out) / "checkpoint-9"
    broken.mkdir()
    (broken / "adapter_model.safetensors").write_bytes(b"")
    assert run(replace(settings, resume=True), console())["loss"] == expected["loss"]


def test_checkpointing_changes_no_loss(settings: TrainSettings, tmp_path: Path) -> None:
    plain = run(replace(settings, steps=4), console())
    other = replace(settings, steps=4, gradient_checkpointing=True, out=str(tmp_path / "gc"))
    assert run(other, console())["loss"] == plain["loss"]


def test_asking_and_evaluating_change_no_loss(settings: TrainSettings, tmp_path: Path) -> None:
    plain = run(replace(settings, steps=6), console())
    other = replace(
        settings, steps=6, ask="what?", eval_data=settings.data, eval_steps=2,
        out=str(tmp_path / "asked"),
    )  # fmt: skip
    report = run(other, console())
    assert report["loss"] == plain["loss"]
    assert [row["step"] for row in report["eval_loss"]] == [2, 4, 6]


def test_resume_refuses_other_settings(settings: TrainSettings) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run(replace(settings, resume=True), console())
    with pytest.raises(Interrupted):
        run(settings, console(InterruptAt("step 2/")))
    with pytest.raises(ConfigError, match=r"lr was 0\.01, is 0\.02; seed was 3, is 4"):
        run(replace(settings, resume=True, lr=0.02, seed=4), console())


def test_an_earlier_run_is_not_replaced_unasked(settings: TrainSettings) -> None:
    short = replace(settings, steps=2)
    run(short, console())
    before = tensors(settings.out)
    with pytest.raises(OutputError, match="or replace it with --overwrite"):
        run(replace(short, seed=9), console())
    run(replace(short, seed=9, overwrite=True), console())
    after = tensors(settings.out)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: TrainSettings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    refused: list[tuple[type[FastAdaptError], str, dict[str, Any]]] = [
        (OutputError, "cannot write to", {"out": str(tmp_path / "file")}),
        (OutputError, "cannot write to", {"out": str(tmp_path / "file" / "out")}),
        (DataError, "No such file", {"data": "none.jsonl"}),
        (DataError, "more than the 128 positions", {"max_length": 129}),
        (DataError, "leaves nothing to train on", {"eval_fraction": 0.99}),
        (ConfigError, "no tokenizer in", {"model": str(tmp_path)}),
        (TargetError, "nowhere", {"target": "q_proj,nowhere"}),
    ]
    for kind, problem, change in refused:
        with pytest.raises(kind, match=problem):
            run(replace(settings, **change), console())
        assert not Path(settings.out).exists() or not list(Path(settings.out).iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(settings: TrainSettings) -> None:
    with pytest.raises(FastAdaptError, match="lower the learning rate"):
        run(replace(settings, lr=1e38, max_grad_norm=0), console())
    assert not list(Path(settings.out).iterdir())


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"learning-rte": 1}, "unknown key 'learning-rte'"),
        ({"batchsize": 1}, "unknown key 'batchsize' .did you mean 'batch_size'"),
        ({"steps": "many"}, "steps must be int or NoneType, got 'many'"),
        ({"steps": 1.5}, "steps must be int"),
        ({"plot": 1}, "plot must be bool"),
        ({"r": 0}, "r must be above 0, got 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\)"),
        ({"method": "loar"}, "method must be one of"),
        ({"steps": 1, "epochs": 1}, "steps and epochs exclude each other"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"out": ""}, "out is needed"),
    ],
)
def test_settings_that_no_run_can_use(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        TrainSettings.from_mapping({"model": "m", "data": "d", "out": "o"} | values)


def test_yaml_values_take_the_type_of_their_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndata: d\nout: o\nlr: 5e-4\nmax-length: 64\ntarget: [q_proj, v_proj]\nsteps:\n"
    )
    settings = TrainSettings.from_mapping(read_yaml(path))
    assert (settings.lr, settings.max_length) == (5e-4, 64)
    assert (settings.target, settings.steps) == ("q_proj,v_proj", None)
    for text, problem in (("- a", "got a list"), ("a: [", "is not YAML")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=problem):
            read_yaml(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml")
