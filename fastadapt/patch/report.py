# SPDX-License-Identifier: Apache-2.0
"""What a training run shows and leaves: the progress bar, report.json, loss.png."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

import fastadapt
from fastadapt.errors import FastAdaptError
from fastadapt.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PACKAGES = (
    "torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "triton",
)  # fmt: skip


class Reporter:
    """Follows a run: times its steps, shows them, and stops it after a step when asked to.

    Times are seconds, from the beginning of the forward pass to the end of the optimizer step;
    tokens are those that are not padding. ``settings`` is written into every checkpoint.
    """

    def __init__(self, console: Console, settings: Mapping[str, Any]) -> None:
        self.stop_requested = False
        self.step_seconds: list[float] = []
        self.tokens = 0
        self._console, self._settings = console, settings
        self._started = 0.0
        self._tokens_before = 0
        self._loss = math.nan
        self._bar: Any = None
        self._task: Any = None

    def callback(self) -> TrainerCallback:
        """This reporter as a callback of transformers' Trainer."""
        from transformers import TrainerCallback

        reporter = self

        class ReportCallback(TrainerCallback):
            def on_train_begin(
                self,
                args: TrainingArguments,
                state: TrainerState,
                control: TrainerControl,
                **_: Any,
            ) -> None:
                reporter._tokens_before = int(state.num_input_tokens_seen)
                reporter._open(state.max_steps, state.global_step)

            def on_step_begin(
                self,
                args: TrainingArguments,
                state: TrainerState,
                control: TrainerControl,
                **_: Any,
            ) -> None:
                reporter._started = time.perf_counter()

            def on_step_end(
                self,
                args: TrainingArguments,
                state: TrainerState,
                control: TrainerControl,
                **_: Any,
            ) -> None:
                reporter._step(int(state.num_input_tokens_seen))
                if reporter.stop_requested:
                    control.should_save = control.should_training_stop = True

            def on_log(
                self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                logs: Mapping[str, float] | None = None, **_: Any,
            ) -> None:  # fmt: skip
                reporter._log(state.global_step, state.max_steps, logs or {})

            def on_save(
                self,
                args: TrainingArguments,
                state: TrainerState,
                control: TrainerControl,
                **_: Any,
            ) -> None:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_json(folder / "settings.json", reporter._settings)

        return ReportCallback()

    def speed(self) -> dict[str, float]:
        """``tokens_per_second``, ``seconds_per_step`` (their mean) and ``seconds_per_step_median``
        over the steps of this session; zeros before the first."""
        total = sum(self.step_seconds)
        return {
            "tokens_per_second": self.tokens / total if total else 0.0,
            "seconds_per_step": total / len(self.step_seconds) if total else 0.0,
            "seconds_per_step_median": median(self.step_seconds) if total else 0.0,
        }

    def close(self) -> None:
        """Take the progress bar off the screen's active lines; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open(self, total: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        if not self._console.is_terminal:
            return
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"), Remaining(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task("", total=total, completed=done, status="")
        self._bar.start()

    def _step(self, tokens_seen: int) -> None:
        self.step_seconds.append(time.perf_counter() - self._started)
        self.tokens += tokens_seen - self._tokens_before
        self._tokens_before = tokens_seen

    def _log(self, step: int, total: int, logs: Mapping[str, float]) -> None:
        if "loss" in logs:
            self._loss = logs["loss"]
            if not math.isfinite(self._loss):
                raise FastAdaptError(
                    f"the loss of step {step} is {self._loss}: lower the learning rate, "
                    "or look at the data of this step; nothing was saved"
                )
        elif "eval_loss" in logs:
            self._console.print(f"step {step}: eval loss {logs['eval_loss']:.4f}")
            return
        else:
            return
        speed = self.tokens / sum(self.step_seconds) if self.step_seconds else 0.0
        status = f"loss {self._loss:.3f}  {speed:.0f} tokens/s  {peak_memory_mib():.0f} MiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif step == total or step % max(1, total // 10) == 0 or len(self.step_seconds) == 1:
            self._console.print(f"step {step}/{total}  {status}", highlight=False)


def peak_rss_mib() -> float:
    """The largest resident memory of this process so far, in MiB."""
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def peak_memory_mib() -> float:
    """The peak of the GPU's memory where there is one, else ``peak_rss_mib``."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_rss_mib()


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that a result depends on; None = not there."""
    found: dict[str, str | None] = {
        "fastadapt": fastadapt.__version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON document, whole or not at all. Raises OutputError."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode())


def plot_loss(
    path: Path, losses: Sequence[float], evaluations: Sequence[tuple[int, float]] = ()
) -> None:
    """Draw the loss of each step, its running mean, and the evaluations. Raises OutputError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    width = max(1, len(losses) // 10)
    mean = [
        sum(losses[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(losses))
    ]
    axes.plot(steps, losses, color="0.75", linewidth=1, label="step")
    axes.plot(steps, mean, color="C0", linewidth=2, label=f"mean of {width} steps")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o", color="C1", label="evaluation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(path, lambda beside: figure.savefig(beside, dpi=120, format="png"))
