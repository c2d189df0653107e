# SPDX-License-Identifier: Apache-2.0
"""One training run, as ``fastadapt train`` and the quickstart do it: through transformers' Trainer.

``run(settings)`` checks everything that can be checked before the model is loaded, patches the
model, trains, and leaves the adapter, report.json and loss.png in ``settings.out``. Ctrl-C ends
the run after the present step with a checkpoint; ``resume`` continues it with the same losses as
a run that was never interrupted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastadapt.errors import CheckpointError, ConfigError, DataError
from fastadapt.patch import loading, output
from fastadapt.patch.conversations import read_conversations
from fastadapt.patch.data import Example, Windows, make_windows
from fastadapt.patch.fit import fit
from fastadapt.patch.inplace import patch
from fastadapt.patch.report import (
    Reporter,
    peak_memory_mib,
    peak_rss_mib,
    plot_loss,
    versions,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastadapt import LoraConfig
    from fastadapt.patch.settings import TrainSettings

FREE_TO_CHANGE = {
    "out", "resume", "overwrite", "ask", "answer_tokens", "plot", "save_steps", "eval_steps",
}  # fmt: skip
"""Settings that a resumed run may change: the losses do not depend on them."""


def run(settings: TrainSettings, console: Console) -> dict[str, Any]:
    """Train and save an adapter; returns the content of report.json.

    Raises ConfigError, DataError, OutputError, CheckpointError or MissingExtraError before
    anything is written, and Interrupted after a Ctrl-C.
    """
    from transformers import set_seed

    import fastadapt

    if settings.plot:
        loading.require("matplotlib", "train", "loss.png")
    config = adapter_config(settings)
    out = output.claim(settings.out, keep=settings.resume, overwrite=settings.overwrite)
    checkpoint = _checkpoint(out, settings) if settings.resume else None
    source = settings.model
    if settings.gguf_file is not None:
        console.print("converting the GGUF file (once) ...", highlight=False)
        cache = loading.gguf_cache(settings.model, settings.gguf_file)
        source = str(loading.convert_gguf(settings.model, settings.gguf_file, cache))
    tokenizer = loading.load_tokenizer(source)
    windows, held_out = _data(settings, tokenizer)
    console.print(_describe(windows, settings), highlight=False)
    model = loading.load_model(
        source,
        dtype=settings.dtype,
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
    )
    _fits(model, [*windows.examples, *held_out], settings)
    set_seed(settings.seed)
    patch(model, config)
    explained = fastadapt.explain(model)
    console.print(explained.table())
    before = _ask(model, tokenizer, settings, console, "before")
    if settings.overwrite:
        output.remove_checkpoints(out)

    reporter = Reporter(console, asdict(settings))
    padding = tokenizer.pad_token_id
    state = fit(model, padding, settings, windows.examples, held_out, reporter, checkpoint)
    model.save_pretrained(str(out))

    after = _ask(model, tokenizer, settings, console, "after")
    trainable, parameters = model.get_nb_trainable_parameters()
    losses = [row["loss"] for row in state.log_history if "loss" in row]
    evaluations = [
        (row["step"], row["eval_loss"]) for row in state.log_history if "eval_loss" in row
    ]
    report: dict[str, Any] = {
        "loss": losses,
        "eval_loss": [{"step": step, "loss": loss} for step, loss in evaluations],
        **reporter.speed(),
        "step_seconds": reporter.step_seconds,
        "peak_rss_mib": peak_rss_mib(),
        "peak_memory_mib": peak_memory_mib(),
        "trainable_parameters": trainable,
        "all_parameters": parameters,
        "kernels": explained.implementations(),
        "versions": versions(),
        "seed": settings.seed,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "resumed_from_step": None if checkpoint is None else int(checkpoint.name.split("-")[1]),
        "data": {
            "examples": len(windows.examples),
            "conversations": windows.conversations,
            "cut": windows.cut,
            "skipped": windows.skipped,
        },
        "answers": {"question": settings.ask, "before": before, "after": after}
        if settings.ask
        else None,
        "settings": asdict(settings),
    }
    if settings.plot:
        plot_loss(out / "loss.png", losses, evaluations)
    write_json(out / "report.json", report)
    if settings.save_steps == 0:
        output.remove_checkpoints(out)
    return report


def adapter_config(settings: TrainSettings) -> LoraConfig:
    """The adapter's config. A target without commas or regex characters is one module's name."""
    from fastadapt import LoraConfig

    target: str | list[str] = settings.target
    if settings.target != "all-linear" and re.fullmatch(r"[\w.,\s]+", settings.target):
        target = [name.strip() for name in settings.target.split(",") if name.strip()]
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target,
        use_rslora=settings.rslora,
        use_dora=settings.method == "dora",
        task_type="CAUSAL_LM",
    )


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: TrainSettings
) -> str:
    """The model's greedy answer to ``settings.ask``; leaves it in the mode that it was in."""
    training = model.training
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": settings.ask}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    model.eval()
    try:
        with torch.no_grad(), loading.quiet():
            ids = model.generate(
                **inputs,
                max_new_tokens=settings.answer_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
    finally:
        model.train(training)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    console: Console,
    when: str,
) -> str | None:
    if not settings.ask:
        return None
    text = answer(model, tokenizer, settings)
    console.print(f"{when}: {settings.ask!r} -> {text!r}", highlight=False, markup=False)
    return text


def _data(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[Windows, list[Example]]:
    """Training windows (no more than the run will see) and the examples that are held out."""
    conversations = read_conversations(settings.data)
    shape: dict[str, Any] = {
        "max_length": settings.max_length, "seed": settings.seed, "long": settings.long
    }  # fmt: skip
    held_out: list[Example] = []
    if settings.eval_data is not None:
        rest = read_conversations(settings.eval_data)
        held_out = make_windows(rest, tokenizer, **shape).examples
    elif settings.eval_fraction:
        share = max(1, round(len(conversations) * settings.eval_fraction))
        if share >= len(conversations):
            raise DataError(
                f"eval_fraction {settings.eval_fraction} of {len(conversations)} conversations "
                "leaves nothing to train on"
            )
        order = torch.randperm(
            len(conversations), generator=torch.Generator().manual_seed(settings.seed)
        ).tolist()
        rest = [conversations[i] for i in order[:share]]
        conversations = [conversations[i] for i in order[share:]]
        held_out = make_windows(rest, tokenizer, **shape).examples
    limit = None
    if settings.steps is not None:
        limit = settings.steps * settings.batch_size * settings.accumulate
    return make_windows(conversations, tokenizer, limit=limit, **shape), held_out


def _describe(windows: Windows, settings: TrainSettings) -> str:
    text = (
        f"{len(windows.examples)} examples of at most {settings.max_length} tokens "
        f"from {windows.conversations} conversations"
    )
    if windows.cut:
        text += f"; {windows.cut} exchanges were longer and were cut"
    if windows.skipped:
        text += f"; {windows.skipped} exchanges were longer and were left out"
    return text


def _fits(model: PreTrainedModel, examples: Sequence[Example], settings: TrainSettings) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and settings.max_length > longest:
        raise DataError(
            f"max_length {settings.max_length} is more than the {longest} positions of "
            f"{settings.model}: lower max_length"
        )
    words = model.get_input_embeddings().weight.shape[0]
    largest = max(max(example.input_ids) for example in examples)
    if largest >= words:
        raise DataError(
            f"the data has token {largest}, the model {words} embeddings: "
            "tokenizer and model do not belong together"
        )


def _checkpoint(out: Path, settings: TrainSettings) -> Path:
    """The newest complete checkpoint; ConfigError where it was made with other settings."""
    found = output.checkpoints(out)
    if not found:
        raise CheckpointError(
            f"{out} holds no complete checkpoint to resume from: start without --resume"
        )
    path = found[-1]
    if (path / "settings.json").is_file():
        then = json.loads((path / "settings.json").read_text(encoding="utf-8"))
        now = asdict(settings)
        changed = [
            f"{key} was {then[key]!r}, is {now[key]!r}"
            for key in sorted(set(now) & set(then) - FREE_TO_CHANGE)
            if then[key] != now[key]
        ]
        if changed:
            raise ConfigError(f"{path.name} was made with other settings: {'; '.join(changed)}")
    return path
