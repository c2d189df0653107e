# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer, set up from TrainSettings; Ctrl-C ends it after a step, resumably."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from fastadapt.patch import loading, output
from fastadapt.patch.data import Example, ExampleDataset, collator
from fastadapt.patch.report import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerState

    from fastadapt.patch.settings import TrainSettings


class Interrupted(KeyboardInterrupt):
    """Training was stopped after a step; ``checkpoint`` is where it continues from."""

    def __init__(self, step: int, total: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped after step {step} of {total}; {checkpoint} is saved: "
            "repeat the command with --resume to continue"
        )
        self.step, self.total, self.checkpoint = step, total, checkpoint


def fit(
    model: PreTrainedModel,
    pad_token_id: int,
    settings: TrainSettings,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    reporter: Reporter,
    checkpoint: Path | None,
) -> TrainerState:
    """Train ``model``, from ``checkpoint`` if there is one, and evaluate it on ``held_out``.

    Raises Interrupted after a Ctrl-C; a second Ctrl-C raises KeyboardInterrupt at once.
    """
    trainer = _trainer(model, pad_token_id, settings, examples, held_out, reporter)
    with loading.quiet(), _stop_on_interrupt(reporter):
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            reporter.close()
        state = trainer.state
        if reporter.stop_requested and state.global_step < state.max_steps:
            saved = Path(settings.out) / f"{output.CHECKPOINT}{state.global_step}"
            raise Interrupted(state.global_step, state.max_steps, saved)
        evaluated = {row["step"] for row in state.log_history if "eval_loss" in row}
        if held_out and state.global_step not in evaluated:
            trainer.evaluate()
    return state


def _trainer(
    model: PreTrainedModel,
    pad_token_id: int,
    settings: TrainSettings,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    reporter: Reporter,
) -> Trainer:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    on_gpu = model.device.type == "cuda"
    batches = math.ceil(len(examples) / settings.batch_size)
    per_epoch = math.ceil(batches / settings.accumulate)
    steps = settings.steps or math.ceil(per_epoch * (settings.epochs or 1.0))
    # transformers renames this option; the older name warns where the newer one is known.
    names = {field.name for field in fields(TrainingArguments)}
    checkpointing = (
        "activation_checkpointing"
        if "activation_checkpointing" in names
        else "gradient_checkpointing"
    )

    class Evaluating(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            # A data loader draws from the generator that dropout draws from; without this, how
            # often a run is evaluated would change its losses.
            with torch.random.fork_rng():
                metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            return metrics

    with loading.quiet():
        trainer = Evaluating(
            model=model,
            args=TrainingArguments(
                output_dir=settings.out,
                max_steps=steps,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=settings.batch_size,
                gradient_accumulation_steps=settings.accumulate,
                learning_rate=settings.lr,
                lr_scheduler_type="constant_with_warmup"
                if settings.schedule == "constant"
                else settings.schedule,
                warmup_steps=settings.warmup,
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.max_grad_norm,
                seed=settings.seed,
                bf16=on_gpu and model.dtype == torch.bfloat16,
                use_cpu=not on_gpu,
                eval_strategy="steps" if held_out and settings.eval_steps else "no",
                eval_steps=settings.eval_steps or None,
                save_strategy="steps" if settings.save_steps else "no",
                save_steps=settings.save_steps or 500,
                logging_steps=1,
                logging_nan_inf_filter=False,
                include_num_input_tokens_seen="non_padding",
                remove_unused_columns=False,
                dataloader_pin_memory=on_gpu,
                dataloader_num_workers=0,
                report_to="none",
                disable_tqdm=True,
                **{
                    checkpointing: settings.gradient_checkpointing,
                    f"{checkpointing}_kwargs": {"use_reentrant": False}
                    if settings.gradient_checkpointing
                    else None,
                },
            ),
            train_dataset=ExampleDataset(examples),
            eval_dataset=ExampleDataset(held_out) if held_out else None,
            data_collator=collator(
                pad_token_id,
                settings.max_length if settings.pad == "max-length" else None,
            ),
            callbacks=[reporter.callback()],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _stop_on_interrupt(reporter: Reporter) -> Iterator[None]:
    """The first Ctrl-C asks for a stop after the present step; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        reporter.stop_requested = True
        signal.signal(signal.SIGINT, previous)
        # Not through the console: the signal may come in the middle of what it writes.
        with suppress(OSError):
            os.write(2, b"\nstopping after this step (Ctrl-C again: at once, unsaved)\n")

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
