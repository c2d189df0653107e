# SPDX-License-Identifier: Apache-2.0
"""One file a method. A new method is its file and its line in ``METHODS``."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastadapt.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from fastadapt.adapter import Adapter

METHODS = {
    "LORA": "lora:Lora",
    "VERA": "vera:Vera",
    "WAVEFT": "waveft:WaveFT",
    "TINYLORA": "tinylora:TinyLora",
    "UNILORA": "unilora:UniLora",
    "PVERA": "pvera:Pvera",
    "C3A": "c3a:C3A",
    "RANDLORA": "randlora:RandLora",
    "FOURIERFT": "fourierft:FourierFT",
    "VBLORA": "vblora:VBLoRA",
    "TRAINABLE_TOKENS": "trainable_tokens:TrainableTokens",
    "IA3": "ia3:IA3",
    "LN_TUNING": "ln_tuning:LNTuning",
    "HIRA": "hira:Hira",
    "MISS": "miss:Miss",
    "ADALORA": "adalora:AdaLora",
    "LOKR": "lokr:LoKr",
    "LOHA": "loha:LoHa",
    "OFT": "oft:OFT",
    "HRA": "hra:HRA",
    "BOFT": "boft:BOFT",
    "ROAD": "road:Road",
    "SHIRA": "shira:Shira",
    "DELORA": "delora:Delora",
    "GRALORA": "gralora:Gralora",
    "BEFT": "beft:Beft",
    "DEFT": "deft:Deft",
    "GLORA": "glora:Glora",
    "PEANUT": "peanut:Peanut",
    "LILY": "lily:Lily",
    "PSOFT": "psoft:Psoft",
    "SUPERTUNING": "supertuning:Supertuning",
    "OSF": "osf:Osf",
    "FROD": "frod:Frod",
    "ADAMSS": "adamss:Adamss",
}
"""PEFT's type -> module of this package : class."""

RENAMED = {"BONE": "MISS"}
"""Types of earlier PEFT releases, as their files have them -> the type now."""


OWN: dict[str, tuple[Any, type[Adapter] | None]] = {}
"""Types that callers registered -> configuration and adapter, None for a configuration alone."""


def method_of(peft_type: Any) -> type[Adapter]:
    """The adapter class that a ``peft_type`` names."""
    name = str(getattr(peft_type, "value", peft_type))
    name = RENAMED.get(name, name)
    if name in OWN:
        own = OWN[name][1]
        if own is None:
            raise UnsupportedError(
                f"the method {name} was registered without an Adapter: pass a subclass of "
                "fastadapt.adapter.Adapter to register_peft_method"
            )
        return own
    if name not in METHODS:
        from fastadapt.config import PeftType

        if name in PeftType.__members__:
            raise UnsupportedError(
                f"the method {name} is not built yet; built: {', '.join(sorted(METHODS))}"
            )
        close = difflib.get_close_matches(name.upper(), METHODS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"expected a peft_type, one of {sorted(METHODS)}, got {name!r}{hint}")
    module, _, cls = METHODS[name].partition(":")
    return getattr(import_module(f"fastadapt.methods.{module}"), cls)  # type: ignore[no-any-return]


UNBUILT = {
    "PROMPT_TUNING": "PromptTuning",
    "MULTITASK_PROMPT_TUNING": "MultitaskPromptTuning",
    "P_TUNING": "PromptEncoder",
    "PREFIX_TUNING": "PrefixTuning",
    "CARTRIDGE": "Cartridge",
    "CPT": "CPT",
    "ADAPTION_PROMPT": "AdaptionPrompt",
    "POLY": "Poly",
    "SHADOW": "Shadow",
    "XLORA": "XLora",
}
"""PEFT's type of a method that is not built yet -> stem of its configuration."""


def config_of(peft_type: Any) -> Any:
    """The configuration class that a ``peft_type`` names, of a method that is built or not."""
    name = str(getattr(peft_type, "value", peft_type))
    if name in UNBUILT and name not in METHODS:
        return getattr(import_module("fastadapt.unbuilt"), f"{UNBUILT[name]}Config")
    if name in OWN:
        return OWN[name][0]
    return method_of(peft_type).Config
