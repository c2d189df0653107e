# SPDX-License-Identifier: Apache-2.0
"""The settings of one training run: ``fastadapt train`` options and the keys of its YAML file.

Every option is a field here, once; the command line is built from these fields.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fastadapt.errors import ConfigError

METHODS = ("lora", "dora")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LONG = ("cut", "skip", "error")
PADDING = ("batch", "max-length")
SCHEDULES = ("linear", "cosine", "constant")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One run. Raises ConfigError for a value that no run could use.

    Lengths are tokens, ``lr`` is the peak learning rate, ``*_steps`` are optimizer steps.
    """

    model: str = _setting("", "model id or folder")
    gguf_file: str | None = _setting(None, "GGUF file inside the model folder (dequantised once)")
    data: str = _setting("", 'JSON lines, one {"messages": [{"role", "content"}, ...]} a line')
    out: str = _setting("", "folder for the adapter, report.json and loss.png")
    method: str = _setting("lora", "lora or dora")
    r: int = _setting(16, "rank")
    alpha: float = _setting(32.0, "scale = alpha / r")
    dropout: float = _setting(0.05, "dropout on the adapter's input")
    target: str = _setting("all-linear", "all-linear, or names with commas, or a regex")
    rslora: bool = _setting(False, "scale = alpha / sqrt(r)")
    load_in_4bit: bool = _setting(False, "NF4 with double quantisation, bfloat16 compute")
    load_in_8bit: bool = _setting(False, "int8 base (LLM.int8)")
    dtype: str = _setting("auto", "dtype of what is not quantised: auto, float32, bfloat16 ...")
    steps: int | None = _setting(None, "optimizer steps (default: one epoch)")
    epochs: float | None = _setting(None, "passes over the data, when steps is not given")
    batch_size: int = _setting(2, "conversations in a batch")
    accumulate: int = _setting(1, "batches in an optimizer step")
    max_length: int = _setting(512, "tokens in an example; longer conversations are divided")
    pad: str = _setting("batch", "pad to the longest of the batch, or to max-length")
    long: str = _setting("cut", "an exchange over max-length: cut, skip or error")
    lr: float = _setting(2e-4, "peak learning rate of AdamW")
    schedule: str = _setting("linear", "linear, cosine or constant")
    warmup: int = _setting(0, "warm-up steps")
    weight_decay: float = _setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = _setting(1.0, "clip the gradient norm; 0 = never")
    seed: int = _setting(0, "seed of the adapter, the order of the data and dropout")
    gradient_checkpointing: bool = _setting(False, "less memory, about a third more time")
    eval_data: str | None = _setting(None, "JSON lines that are only evaluated")
    eval_fraction: float = _setting(0.0, "share of the conversations to hold out")
    eval_steps: int = _setting(0, "evaluate every N steps; 0 = at the end")
    save_steps: int = _setting(0, "checkpoint every N steps; 0 = only when interrupted")
    resume: bool = _setting(False, "continue from the newest checkpoint in out")
    overwrite: bool = _setting(False, "replace what an earlier run left in out")
    ask: str | None = _setting(None, "a question to answer before and after")
    answer_tokens: int = _setting(40, "length of that answer")
    plot: bool = _setting(True, "write loss.png")

    def __post_init__(self) -> None:
        problems = [
            f"{name} is needed" for name in ("model", "data", "out") if not getattr(self, name)
        ]
        for name, allowed in (
            ("method", METHODS), ("dtype", DTYPES), ("long", LONG), ("pad", PADDING),
            ("schedule", SCHEDULES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("r", "batch_size", "accumulate", "max_length", "steps", "epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                problems.append(f"{name} must be above 0, got {value}")
        problems += [
            f"{name} must not be negative, got {getattr(self, name)}"
            for name in ("warmup", "weight_decay", "max_grad_norm", "eval_steps", "save_steps")
            if getattr(self, name) < 0
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.eval_fraction < 1:
            problems.append(f"eval_fraction must be in [0, 1), got {self.eval_fraction}")
        for one, other in (
            ("load_in_4bit", "load_in_8bit"), ("steps", "epochs"), ("resume", "overwrite"),
            ("eval_data", "eval_fraction"),
        ):  # fmt: skip
            if getattr(self, one) and getattr(self, other):
                problems.append(f"{one} and {other} exclude each other: give one of them")
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "settings") -> TrainSettings:
        """Settings from a mapping whose keys are field names, with '-' or '_'.

        Raises ConfigError naming every unknown key (with the nearest known one) and every value
        of the wrong type.
        """
        types = {f.name: allowed_types(f.name) for f in fields(cls)}
        taken: dict[str, Any] = {}
        problems = []
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in types:
                near = difflib.get_close_matches(name, types, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                problems.append(f"unknown key {key!r}{hint}")
                continue
            try:
                taken[name] = _coerced(value, types[name])
            except (TypeError, ValueError):
                wanted = " or ".join(t.__name__ for t in types[name])
                problems.append(f"{key} must be {wanted}, got {value!r}")
        if problems:
            raise ConfigError(f"{source}: " + "; ".join(problems))
        return cls(**taken)


def allowed_types(name: str) -> tuple[type, ...]:
    """The types of a field: ``int | None`` gives (int, NoneType)."""
    hint = get_type_hints(TrainSettings)[name]
    return get_args(hint) or (hint,)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it is not there or not a mapping."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, got a {type(content).__name__}")
    return content


def _coerced(value: Any, types: tuple[type, ...]) -> Any:
    """``value`` as one of ``types``; a YAML ``5e-4`` arrives as text, a list of names as a list."""
    if value is None or isinstance(value, bool):
        if type(value) in types:
            return value
        raise TypeError
    if str in types:
        if isinstance(value, list):
            return ",".join(str(item) for item in value)
        return str(value)
    kind = next(t for t in types if t in (int, float, bool))
    if kind is bool or (kind is int and float(value) != int(value)):
        raise ValueError
    return kind(value)
