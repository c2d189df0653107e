# SPDX-License-Identifier: Apache-2.0
"""Everything that is wrong with a configuration in one error, unknown fields with near misses.

A check of a class ``Checked`` notes its problem and the next one runs; the error comes when all
have run.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from fastadapt.errors import ConfigError, FieldError

_NOTED = "_problems"


class Checked(type):
    """The metaclass of configurations."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made: Any = cls.__new__(cls)  # type: ignore[call-overload]
        known, takes_all = _parameters(cls)
        unknown = [] if takes_all else [name for name in kwargs if name not in known]
        noted: list[Exception] = [
            FieldError(f"{cls.__name__} has no field {near(name, known)}") for name in unknown
        ]
        vars(made)[_NOTED] = noted
        try:
            made.__init__(*args, **{k: v for k, v in kwargs.items() if k not in unknown})
        except ConfigError as error:
            noted.append(error)
        except Exception:
            # what a wrong value does to a later check is no problem of its own
            if not noted:
                raise
        vars(made).pop(_NOTED, None)
        if noted:
            raise _joined(cls.__name__, noted, known)
        return made


def note(config: Any, error: ConfigError) -> None:
    """A problem of a configuration that is being made; raised at once when none is."""
    noted: list[Exception] | None = vars(config).get(_NOTED)
    if noted is None:
        raise error
    noted.append(error)


@contextmanager
def noting(config: Any) -> Iterator[None]:
    """Inside, a ConfigError is noted, and what comes after the ``with`` runs."""
    try:
        yield
    except ConfigError as error:
        note(config, error)


def near(name: str, known: set[str]) -> str:
    """The name, with the nearest one that exists."""
    close = difflib.get_close_matches(name, known, 1)
    return f"{name!r}" + (f": did you mean {close[0]!r}?" if close else "")


@cache
def _parameters(cls: Any) -> tuple[set[str], bool]:
    """What ``__init__`` takes by name, and whether it takes any name."""
    found = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name for p in found}, any(p.kind is p.VAR_KEYWORD for p in found)


def _joined(name: str, noted: list[Exception], fields: set[str]) -> Exception:
    """One error; of several problems of one field the first, which the others may come of."""
    found: dict[str, Exception] = {}
    for error in noted:
        text = str(error)
        word = text.split(" ")[0].strip("`:")
        found.setdefault(word if word in fields else text, error)
    if len(found) == 1:
        return noted[0]
    kind = next((type(e) for e in noted if isinstance(e, FieldError)), ConfigError)
    lines = "".join(f"\n- {error}" for error in found.values())
    return kind(f"{name} has {len(found)} problems:{lines}")
