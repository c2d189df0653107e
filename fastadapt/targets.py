# SPDX-License-Identifier: Apache-2.0
"""Which modules a configuration selects: names, a pattern, "all-linear", layer indices, defaults.

Patterns run under a time limit, so that one that takes exponential time is an error, not a hang.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import regex
from torch import nn

from fastadapt.errors import TargetError

ALL_LINEAR = "all-linear"
PATTERN_SECONDS = 1.0
PLAN_SECONDS = 2.0
_deadline: ContextVar[float | None] = ContextVar("deadline of the plan's patterns", default=None)
_PLAIN = re.compile(r"[\w.]+")
_MIN_TO_CONDENSE = 20
_NAMED = 20
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Children that FSDP and activation checkpointing put in the way; attributes pass through both."""
_HEADS = ("classifier", "score")

_QV = ["q_proj", "v_proj"]
_BY_TARGET: tuple[tuple[list[str], str], ...] = (
    (_QV, "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2"),
    (_QV, "gemma3_text qwen2 qwen3"),
    (["query", "value"], "bert roberta xlm-roberta electra layoutlm"),
    (["query_key_value"], "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon"),
    (["q", "v"], "t5 mt5"),
    (["c_attn"], "gpt2 gpt_bigcode"),
)
DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **{model_type: names for names, types in _BY_TARGET for model_type in types.split()},
    "blip-2": ["q", "v", *_QV],
    "deberta-v2": ["query_proj", "value_proj"],
    "deberta": ["in_proj"],
    "mpt": ["Wqkv"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "phi": [*_QV, "fc1", "fc2"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}
"""PEFT's default targets of LoRA and its relatives, by ``model.config.model_type``."""


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the model's own modules: an adapted layer counts as one, and what stands
    inside it (base layer, adapter parameters, trained copies) is not visited. A wrapper of one
    parameter leaves the modules inside the model's own, and those are visited."""
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield from _within(prefix if name in _WRAPPERS else path, child)


def _within(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    if not is_adapted(module):
        yield from walk(module, path)
    elif "parameter_name" in vars(module):
        inner = module.get_submodule("base_layer")
        at = f"{path}.base_layer"
        yield from _within(at, inner) if is_adapted(inner) else walk(inner, at)


def is_adapted(module: nn.Module) -> bool:
    """The module was put there by us: an adapted layer or a module that is trained whole."""
    return hasattr(type(module), "adapter_layer_names")


def default_targets(
    model: nn.Module, table: Mapping[str, list[str] | str] = DEFAULT_TARGETS
) -> list[str] | str:
    """The default for the model's type; raises TargetError when the type has none."""
    kind = model_type(model)
    if kind is None or kind not in table:
        raise TargetError(
            f"Please specify `target_modules` in `peft_config`: there is no default for the model "
            f"type {kind!r}"
        )
    return table[kind]


def linear_paths(model: nn.Module, is_linear: Callable[[nn.Module], bool]) -> set[str]:
    """Every linear layer but the output head, by path."""
    head = None
    if hasattr(model, "get_output_embeddings"):
        try:
            head = model.get_output_embeddings()  # type: ignore[operator]
        except NotImplementedError:
            head = None
    if head is None:
        head = next((getattr(model, h) for h in _HEADS if hasattr(model, h)), None)
    inside = set() if head is None else {id(m) for m in head.modules()}
    return {p for p, m in walk(model) if id(m) not in inside and is_linear(m)}


def select(config: Any, paths: Iterable[str]) -> list[str]:
    """The paths that ``config`` targets, in the order given."""
    test = Matcher(config)
    return [p for p in paths if test(p)]


def unmatched(config: Any, paths: Iterable[str]) -> dict[str, str | None]:
    """Target names that select no path -> the nearest name that exists, if any is near."""
    names = config.target_modules
    if not isinstance(names, set | list):
        return {}
    paths = list(paths)
    endings = {end for p in paths for end in _endings(p)}
    absent = [n for n in sorted(names) if n not in endings]
    leaves = {p.rpartition(".")[2] for p in paths}
    near = {n: next(iter(difflib.get_close_matches(n, leaves, 1)), None) for n in absent[:_NAMED]}
    return {**dict.fromkeys(absent), **near}


def idle_patterns(config: Any, chosen: Iterable[str]) -> dict[str, list[str]]:
    """The field of ranks or alphas by pattern -> its patterns that match no chosen path."""
    chosen, found = list(chosen), {}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name, None) or {}
        # AdaLoRA's are masks of whole layers
        wanted = tuple(p for p, value in patterns.items() if isinstance(value, int | float))
        with time_limit():
            found[name] = sorted(_unused(wanted, chosen))
    return {name: idle for name, idle in found.items() if idle}


def describe(absent: dict[str, str | None]) -> str:
    """The names, with near misses, for a message."""
    shown = [f"{n!r}" + (f" (did you mean {c!r}?)" if c else "") for n, c in absent.items()]
    more = [f"and {len(shown) - _NAMED} more"] if len(shown) > _NAMED else []
    return ", ".join([*shown[:_NAMED], *more])


def condense(targets: set[str], others: Iterable[str]) -> set[str]:
    """The shortest names whose suffix match selects ``targets`` and none of ``others``; long lists
    only, as in PEFT, so that a config file says q_proj and not 30 paths."""
    return targets if len(targets) < _MIN_TO_CONDENSE else shortest(targets, others)


def shortest(targets: Iterable[str], others: Iterable[str]) -> set[str]:
    """The shortest names whose suffix match selects ``targets`` and none of ``others``."""
    barred = {end for other in others for end in _endings(other)}
    taken: set[str] = set()
    for path in sorted(targets, key=lambda p: (len(p), p)):
        if taken.isdisjoint(_endings(path)):
            suffixes = list(_endings(path))[::-1]
            taken.add(next((s for s in suffixes if s not in barred), path))
    return taken


class Matcher:
    """path -> is it targeted by ``config``? Follows PEFT: suffix match for names, full match for
    a pattern, then exclusions, trained modules and layer indices."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._deadline = time.monotonic() + PATTERN_SECONDS

    def __call__(self, path: str) -> bool:
        config = self._config
        if self.excludes(path):
            return False
        targets = config.target_modules
        if targets is None or not self._hits(targets, path):
            return False
        if isinstance(targets, str) or path in targets:
            return True
        return self._layer_chosen(path)

    def excludes(self, path: str) -> bool:
        """The path is among ``exclude_modules``, or in a module that is trained whole."""
        config = self._config
        if config.exclude_modules and self._hits(config.exclude_modules, path):
            return True
        saved = config.modules_to_save or ()
        return any(self._match(rf"(^|.*\.){m}($|\..*)", path) for m in saved)

    def _hits(self, names: Any, path: str) -> bool:
        if isinstance(names, str):
            return self._match(names, path)
        return any(end in names for end in _endings(path))

    def _layer_chosen(self, path: str) -> bool:
        chosen = self._config.layers_to_transform
        if chosen is None or chosen == []:
            return True
        patterns = self._config.layers_pattern or []
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        # the first numbered segment is the layer; a later one may be an expert
        forms = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] or [
            r".*?\.[^.]*\.(?P<idx>\d+)\."
        ]
        left = self._deadline - time.monotonic()
        found = next((m for f in forms if (m := _timed(regex.match, f, path, left))), None)
        if found is None:
            return False
        index = int(found["idx"])
        return index == chosen if isinstance(chosen, int) else index in chosen

    def _match(self, pattern: str, path: str) -> bool:
        return full_match(pattern, path, self._deadline - time.monotonic())


def full_match(pattern: str, path: str, seconds: float | None = None) -> bool:
    """The pattern is the whole path. Raises TargetError for one that takes too long."""
    return _timed(regex.fullmatch, pattern, path, _left(seconds)) is not None


def matches_within(pattern: str, path: str, seconds: float | None = None) -> bool:
    """The pattern is somewhere in the path. Raises TargetError for one that takes too long."""
    return _timed(regex.search, pattern, path, _left(seconds)) is not None


def _timed(match: Callable[..., Any], pattern: str, path: str, seconds: float) -> Any:
    try:
        if seconds <= 0:
            raise TimeoutError
        return match(pattern, path, timeout=seconds)
    except TimeoutError:
        _too_long(pattern)
    except regex.error as error:
        raise TargetError(f"{pattern!r} is not a regular expression: {error}") from error


def _left(seconds: float | None) -> float:
    """The time that one match has: what is given, else what the plan has left."""
    deadline = _deadline.get()
    if seconds is None:
        return PATTERN_SECONDS if deadline is None else deadline - time.monotonic()
    return seconds


def _too_long(pattern: str) -> NoReturn:
    raise TargetError(
        f"the pattern {reprlib.repr(pattern)} takes too long on the module names: simplify nested "
        "repetitions, or give names instead"
    )


@contextmanager
def time_limit(seconds: float = PLAN_SECONDS) -> Iterator[None]:
    """All patterns matched inside share this time: a config may have thousands, for each layer."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key of a rank or alpha pattern that matches the end of ``path``.

    Raises TargetError when the patterns of one plan take too long, all layers together."""
    # called for every module: one call on its own gets a small part of the time
    deadline = _deadline.get() or time.monotonic() + PATTERN_SECONDS / 10
    keys = tuple(patterns)
    table = _table(keys)
    found = min(table.plain_hits(path), default=len(keys))
    for order in table.expressions:
        if order > found:
            break
        pattern = rf"(.*\.)?({keys[order]})$"
        if _timed(regex.match, pattern, path, deadline - time.monotonic()):
            found = order
    return patterns[keys[found]] if found < len(keys) else default


class _Table(NamedTuple):
    """Keys of a pattern dict, for lookup: most are paths, and a file may have one for each layer.

    plain: key of word characters and dots -> its place; dots: length -> where keys of that length
    have dots, which stand for any character; expressions: the places of the others."""

    plain: dict[str, int]
    dots: dict[int, set[tuple[int, ...]]]
    expressions: list[int]

    def plain_hits(self, path: str) -> Iterator[int]:
        """The places of the plain keys that match the end of ``path``."""
        for end in _endings(path):
            for places in self.dots.get(len(end), ()):
                chars = list(end)
                for at in places:
                    chars[at] = "."
                place = self.plain.get("".join(chars))
                if place is not None:
                    yield place


@lru_cache(maxsize=8)
def _table(keys: tuple[str, ...]) -> _Table:
    made = _Table({}, {}, [])
    for place, key in enumerate(keys):
        if _PLAIN.fullmatch(key):
            made.plain[key] = place
            where = tuple(i for i, c in enumerate(key) if c == ".")
            made.dots.setdefault(len(key), set()).add(where)
        else:
            made.expressions.append(place)
    return made


def _unused(keys: tuple[str, ...], paths: Iterable[str]) -> set[str]:
    """The patterns that match the end of no path."""
    table = _table(keys)
    plain: set[int] = set()
    open_ = set(table.expressions)
    for path in paths:
        plain.update(table.plain_hits(path))
        open_ -= {
            i for i in open_
            if _timed(regex.match, rf"(.*\.)?({keys[i]})$", path, _left(None))
        }  # fmt: skip
    idle = open_ | (set(table.plain.values()) - plain)
    return {keys[i] for i in idle}


def _endings(path: str) -> Iterator[str]:
    """The path, and what is left of it after each of its dots."""
    yield path
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


def model_type(model: nn.Module) -> str | None:
    """``model.config.model_type``, where there is one."""
    config: Any = getattr(model, "config", None)
    if isinstance(config, dict):
        return config.get("model_type")
    return getattr(config, "model_type", None)
