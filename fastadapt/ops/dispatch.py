# SPDX-License-Identifier: Apache-2.0
"""One op, several implementations, chosen per call.

An ``Op`` registers a schema with ``torch.library``; its kernel is ``run``, which picks an
implementation. The PyTorch reference is the spec, the fake (meta) kernel, the oracle of the tests
and the fallback. ``FASTADAPT_IMPL`` or ``use(name)`` forces an implementation: a forced one runs
or raises, it never falls back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch

from fastadapt.errors import ConfigError, KernelError

IMPLEMENTATIONS = ("triton", "native", "reference")
"""In order of preference: the first that can serve a call does."""

_forced: ContextVar[str | None] = ContextVar("fastadapt_impl", default=None)
_library = torch.library.Library("fastadapt", "DEF")
OPS: dict[str, Op] = {}


def forced() -> str | None:
    """The implementation that ``use`` or FASTADAPT_IMPL asks for, None for automatic choice."""
    name = _forced.get() or os.environ.get("FASTADAPT_IMPL", "auto")
    if name == "auto":
        return None
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"FASTADAPT_IMPL must be auto or one of {IMPLEMENTATIONS}, got {name!r}")
    return name


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Force one implementation inside a ``with`` block: "reference", "triton", "native", "auto"."""
    if implementation not in (*IMPLEMENTATIONS, "auto"):
        raise ConfigError(
            f"implementation must be auto or one of {IMPLEMENTATIONS}, got {implementation!r}"
        )
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


class Op:
    """A ``torch.library`` op ``fastadapt::<name>`` with its implementations.

    schema:    "(Tensor x, ...) -> Tensor"
    reference: plain PyTorch, runs on fake tensors too
    others:    implementation name -> "module:function" (imported at first use); the module may
               define ``why_not_<function>(*args) -> str | None``, asked before every call
    """

    def __init__(
        self, name: str, schema: str, reference: Callable[..., Any], **others: str
    ) -> None:
        unknown = set(others) - set(IMPLEMENTATIONS)
        if unknown:
            raise ConfigError(f"op {name}: unknown implementations {sorted(unknown)}")
        self.name, self.reference, self._where = name, reference, others
        self.implementations = tuple(i for i in IMPLEMENTATIONS if i in {*others, "reference"})
        self._loaded: dict[str, tuple[Callable[..., Any], Callable[..., str | None]] | str] = {}
        _library.define(name + schema)
        _library.impl(name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastadapt::{name}", self.fake, lib=_library)
        self.call = getattr(torch.ops.fastadapt, name).default
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def choose(self, *args: Any) -> str:
        """The name of the implementation that ``run`` will take for these arguments."""
        name = forced()
        if name is not None:
            reason = self.why_not(name, *args)
            if reason is not None:
                raise KernelError(f"{self.name}: {name!r} was forced and cannot run: {reason}")
            return name
        return next(i for i in IMPLEMENTATIONS if self.why_not(i, *args) is None)

    def run(self, *args: Any) -> Any:
        name = self.choose(*args)
        function: Any = self.reference if name == "reference" else self._loaded[name][0]
        return _as_written(function, args)

    def fake(self, *args: Any) -> Any:
        return _as_written(self.reference, args)

    def why_not(self, implementation: str, *args: Any) -> str | None:
        """Why an implementation cannot serve this call; None when it can."""
        if implementation == "reference":
            return None
        if implementation not in self._where:
            return f"{implementation}: no implementation of {self.name}"
        entry = self._loaded.get(implementation)
        if entry is None:
            entry = self._loaded[implementation] = _load(self._where[implementation])
        if isinstance(entry, str):
            return f"{implementation}: {entry}"
        reason = entry[1](*args)
        return None if reason is None else f"{implementation}: {reason}"


def triton_state() -> str:
    """One line on triton and the kernels that need it: tested, untested, too old, missing or
    broken. Where they cannot run, the reference or the native extension serves."""
    try:
        return str(import_module("fastadapt.kernels.launch").state())
    except Exception as error:  # a broken triton fails in ways of its own
        return f"no Triton kernel can run ({type(error).__name__}: {error})"


def _as_written(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Autocast would cast every product inside an op again; an op is told its dtypes."""
    if not torch._C._is_any_autocast_enabled():
        return function(*args)
    with torch._C._DisableAutocast():
        return function(*args)


def _load(where: str) -> tuple[Callable[..., Any], Callable[..., str | None]] | str:
    """The function and its ``why_not``, or the reason why the module cannot be imported.

    The answer is kept by the caller: a failed import costs 90 us when it is tried again."""
    module_name, _, function = where.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:  # a broken third party fails in ways of its own
        return f"{module_name} cannot be imported ({type(error).__name__}: {error})"
    return getattr(module, function), getattr(module, f"why_not_{function}", lambda *_: None)
