# SPDX-License-Identifier: Apache-2.0
"""Every error that a user can meet.

Each class also derives from the built-in that PEFT raises in the same situation, so that
``except ValueError`` in a script written for PEFT keeps its meaning. Messages say what was
expected, what came, and what to do.
"""

from __future__ import annotations


class FastAdaptError(Exception):
    """The root of the family."""


PeftError = FastAdaptError
"""PEFT's name for the root of its errors."""


class ConfigError(FastAdaptError, ValueError):
    """A configuration that no model could satisfy: an unknown field, a rank of zero, a clash."""


class FieldError(ConfigError, TypeError):
    """A field that PEFT's configuration of this name does not have, or a value of a wrong type."""


class NoConfigError(ConfigError, TypeError):
    """A JSON file that is no adapter configuration: fields that no class has, and no peft_type."""


class TargetError(FastAdaptError, ValueError):
    """Target names, patterns or layer indices that select nothing, or cannot be evaluated."""


class UnsupportedError(FastAdaptError, ValueError, NotImplementedError):
    """A combination that cannot be (VeRA on a convolution) or is not built yet, by name."""


class ModuleTypeError(UnsupportedError, TypeError):
    """A module of a type that cannot be adapted or trained whole, such as a ModuleList."""


NoMatchingPeftModuleError = TargetError


class LifecycleError(FastAdaptError, ValueError):
    """An operation that the adapter's present state does not allow."""


class CheckpointError(FastAdaptError, ValueError, RuntimeError):
    """A checkpoint that was not loaded or not written; lists every problem at once."""


class AdapterConfigError(CheckpointError, ConfigError):
    """A checkpoint whose config no model could satisfy, among its problems."""


class KernelError(FastAdaptError, RuntimeError):
    """Arguments that an op cannot take, or a forced implementation that cannot serve the call."""


class DataError(FastAdaptError, ValueError):
    """Training data that is missing, empty or not what the recipe needs."""


class OutputError(FastAdaptError, OSError):
    """A folder or file that cannot be written."""


class MissingExtraError(FastAdaptError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str, purpose: str = "") -> None:
        what = f" for {purpose}" if purpose else ""
        super().__init__(
            f"the package {package!r} is needed{what} and is not installed: "
            f"run `pip install 'fastadapt[{extra}]'`"
        )
        self.package, self.extra = package, extra


class FastAdaptWarning(UserWarning):
    """Something the user can act on; nothing was changed silently."""


PeftWarning = FastAdaptWarning
