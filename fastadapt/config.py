# SPDX-License-Identifier: Apache-2.0
"""Adapter configurations: PEFT's fields, spelling and json, and the fields that methods share.

Real ``peft`` config objects are accepted wherever a config is, and given back by ``to_peft``.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import fastadapt.methods as registry
from fastadapt.errors import (
    CheckpointError,
    ConfigError,
    FastAdaptWarning,
    FieldError,
    NoConfigError,
)
from fastadapt.files import fetch, write_atomic
from fastadapt.problems import Checked, near, note
from fastadapt.targets import DEFAULT_TARGETS, default_targets

CONFIG_NAME = "adapter_config.json"
PEFT_SCHEMA = "0.21.2"
"""The PEFT release whose config fields and file layout these are; written as ``peft_version``."""

__version__ = PEFT_SCHEMA

MAX_CONFIG_BYTES = 4 << 20

C = TypeVar("C", bound="PeftConfig")


class TaskType(str, enum.Enum):  # noqa: UP042 - PEFT's, with its str()
    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


PeftType = enum.Enum(  # type: ignore[misc]
    "PeftType",
    {
        n: n
        for n in (  # noqa: SIM905
            "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA ADAMSS BOFT "
            "ADAPTION_PROMPT IA3 BEFT LILY LOHA LOKR OFT POLY LN_TUNING VERA FROD PVERA FOURIERFT "
            "GLORA UNILORA XLORA HRA VBLORA CPT MISS RANDLORA ROAD TRAINABLE_TOKENS HIRA SHIRA C3A "
            "WAVEFT OSF DELORA GRALORA CARTRIDGE TINYLORA PSOFT PEANUT SHADOW SUPERTUNING DEFT"
        ).split()
    },
    type=str,
    module=__name__,
)


@dataclass
class PeftConfig(metaclass=Checked):
    """What every configuration has.

    task_type: one of ``TaskType``; base_model_name_or_path: filled in from the model when None;
    inference_mode: the adapter is loaded frozen.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        own: Any = getattr(type(self), "_own", type(self))
        for name, hint in _hints(own).items():
            value = getattr(self, name)
            missing = value is None and hint in (int, float, bool)
            if missing or (value is not None and not _fits(value, hint)):
                expected = hint.__name__ if isinstance(hint, type) else hint
                expected = "an integer" if missing and hint is int else expected
                text = f"{name}: expected {expected}, got {reprlib.repr(value)}"
                note(self, ConfigError(text))
        if self.task_type is not None and self.task_type not in [t.value for t in TaskType]:
            allowed = ", ".join(t.value for t in TaskType)
            note(
                self,
                ConfigError(
                    f"Invalid task type: {self.task_type!r}. Must be one of the following task "
                    f"types: {allowed}."
                ),
            )
        if self.peft_version is None:
            self.peft_version = _version()

    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False

    @classmethod
    def known_fields(cls) -> set[str]:
        """The names of the fields that a file may hold."""
        return {f.name for f in dataclasses.fields(cls) if f.init}

    def to_dict(self) -> dict[str, Any]:
        """Every field, plain values."""
        known = self.known_fields()
        return {k: v for k, v in dataclasses.asdict(self).items() if k in known}

    def to_json(self, **changes: Any) -> str:
        """The text of adapter_config.json, with ``changes`` to some fields."""
        values = {**self.to_dict(), **changes}
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
        return json.dumps(values, indent=2, sort_keys=True, default=_plain)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json into the folder, atomically."""
        folder = Path(save_directory)
        if folder.is_file():
            raise ConfigError(f"expected a directory, got the file {folder}")
        mapping = kwargs.pop("auto_mapping_dict", None)
        changes = {} if mapping is None else {"auto_mapping": mapping}
        write_atomic(folder / CONFIG_NAME, self.to_json(**changes).encode())

    def to_peft(self) -> Any:
        """The same configuration as an object of the ``peft`` package."""
        import peft

        cls: Any = getattr(peft, type(self).__name__)
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        return cls(**{k: v for k, v in self.to_dict().items() if k in known})

    def at(self: C, path: str) -> C:
        """The configuration as it applies to the module at ``path`` (rank patterns)."""
        return self

    @classmethod
    def of_earlier(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A file's values as they say today what they said when they were written."""
        return values

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **_: Any) -> dict[str, Any]:
        """The values in a config file. Raises CheckpointError for what is no config."""
        path = Path(path_json_file)
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{path}: expected a config of at most {MAX_CONFIG_BYTES} bytes, got {size}"
            )
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected a JSON object, got {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
        if values.pop("runtime_config", None) is not None:
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. Runtime "
                "configurations are only valid at runtime.",
                stacklevel=2,
            )
        return values

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The configuration in a folder or hub repository, of the class that its type names."""
        path = fetch(str(pretrained_model_name_or_path), CONFIG_NAME, subfolder=subfolder, **kwargs)
        if path is None:
            raise CheckpointError(
                f"Can't find '{CONFIG_NAME}' at '{pretrained_model_name_or_path}'"
            )
        return cls.from_file(path)

    @classmethod
    def from_file(cls, path: Path) -> Any:
        """The configuration in a file, of any PEFT release."""
        values = cls.from_json_file(path)
        if values.get("peft_type") is not None:
            values = registry.config_of(values["peft_type"]).of_earlier(values)
        return cls.from_peft_type(**values)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """A configuration from a file's values; the class is the one that ``peft_type`` names.

        Fields of a newer PEFT are left out with a warning, as PEFT does."""
        peft_type = kwargs.get("peft_type")
        target = cls if peft_type is None else registry.config_of(peft_type)
        known = target.known_fields()
        unknown = sorted(set(kwargs) - known)
        if unknown:
            if peft_type is None:
                raise NoConfigError(
                    f"The {target.__name__} config that is trying to be loaded is missing required "
                    f"keys: {{'peft_type'}}. It has no field {near(unknown[0], known)}."
                )
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {target.__name__}, these are "
                "ignored. They were saved by a newer version of PEFT.",
                FastAdaptWarning,
                stacklevel=2,
            )
        try:
            return target(**{k: v for k, v in kwargs.items() if k in known})
        except (TypeError, AttributeError) as error:
            raise ConfigError(
                f"{target.__name__}: a field has a value of a wrong type: {error}"
            ) from error


PeftConfigMixin = PeftConfig


@dataclass
class AdapterConfig(PeftConfig):
    """The fields that weight-space methods share.

    target_modules: names (suffix match), a regular expression (full match) or "all-linear";
    exclude_modules: the same, taken out; layers_to_transform: layer indices; layers_pattern: the
    name in front of the index; modules_to_save: trained whole and saved with the adapter.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    without: ClassVar[tuple[str, ...]] = ()
    """Shared fields that PEFT's class of this name does not have."""

    default_targets: ClassVar[Mapping[str, list[str] | str]] = DEFAULT_TARGETS
    """Model type -> target_modules when None is given."""

    repeats_targets: ClassVar[bool] = False
    """Another field repeats target names, so that a long list of them is not shortened."""

    def default_targets_in(self, model: Any) -> list[str] | str:
        """``target_modules`` when None is given; TargetError for a type without a default."""
        return default_targets(model, self.default_targets)

    def for_model(self, model_type: str | None) -> Self:
        """A copy with fields that default by model type (``target_modules`` apart) filled in."""
        return self

    @classmethod
    def known_fields(cls) -> set[str]:
        """The names that PEFT's class has too."""
        return super().known_fields() - set(cls.without)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.without:
            if getattr(self, name) is not None:
                note(self, FieldError(f"{type(self).__name__} has no field {name!r}"))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, set(value))
        saved: Any = self.modules_to_save
        if isinstance(saved, tuple | set | frozenset):
            self.modules_to_save = sorted(saved)
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    note(
                        self,
                        ConfigError(
                            f"`{name}` cannot be used when `target_modules` is a str; put the "
                            "layers into the pattern"
                        ),
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            note(
                self,
                ConfigError(
                    "When `layers_pattern` is specified, `layers_to_transform` must also be "
                    "specified. "
                ),
            )


def as_config(config: Any) -> AdapterConfig:
    """Ours, from ours, from a ``peft`` config object or from a dict of fields."""
    if isinstance(config, PeftConfig):
        return config  # type: ignore[return-value]
    if isinstance(config, dict):
        return from_dict(config)
    if hasattr(config, "peft_type") and hasattr(config, "to_dict"):
        values = dict(config.to_dict())
        values.pop("runtime_config", None)
        values["peft_type"] = str(getattr(config.peft_type, "value", config.peft_type))
        return PeftConfig.from_peft_type(**values)  # type: ignore[no-any-return]
    raise ConfigError(
        f"expected a configuration such as LoraConfig(r=16), got {type(config).__name__}"
    )


def from_dict(values: dict[str, Any]) -> AdapterConfig:
    """``get_peft_config``: unknown fields are refused, with near misses."""
    if "peft_type" not in values:
        raise ConfigError("expected a peft_type among the values, got none")
    target = registry.config_of(values["peft_type"])
    known = target.known_fields()
    for name in values:
        if name not in known:
            raise ConfigError(f"{target.__name__} has no field {near(name, known)}")
    return target(**values)  # type: ignore[no-any-return]


def _version() -> str:
    """``__version__``; of a development version with the commit that it was installed from."""
    if ".dev" not in __version__:
        return __version__
    try:
        commit = _get_commit_hash("fastadapt")
    except Exception:  # metadata that cannot be read must not stop a training run
        warnings.warn(
            "A dev version of PEFT is used but there was an error while trying to determine the "
            "commit hash; peft_version ends in @UNKNOWN.",
            stacklevel=2,
        )
        commit = None
    return f"{__version__}@{commit or 'UNKNOWN'}"


def _get_commit_hash(pkg_name: str) -> str | None:
    """The commit of a package that pip installed from version control, else None."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        text = distribution(pkg_name).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    commit = json.loads(text).get("vcs_info", {}).get("commit_id") if text else None
    return None if commit is None else str(commit)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _fits(value: Any, hint: Any) -> bool:
    """The value is what a field's annotation says; any sequence is a list."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, h) for h in inner)
    if kind in (list, set):
        listed = isinstance(value, list | tuple | set | frozenset)
        return listed and all(_fits(v, h) for v in value for h in inner)
    if kind is dict:
        return isinstance(value, dict) and all(
            _fits(v, h) for pair in value.items() for v, h in zip(pair, inner, strict=False)
        )
    if kind in (int, float):
        # finite, and a number that torch can take; a comparison with NaN is false
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return number and abs(value) < 2**63
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} cannot be written to json")
