# SPDX-License-Identifier: Apache-2.0
"""PEFT's constants, mappings by method and by task, and tests for optional packages."""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastadapt.compat.names import TUNERS, find
from fastadapt.config import CONFIG_NAME, PeftType
from fastadapt.methods import METHODS, config_of, method_of

__all__ = ["CONFIG_NAME"]

WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME = "adapter_model.bin", "adapter_model.safetensors"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
                 "float8_e8m0fnu")  # fmt: skip

_MIXED = ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA")


def _available(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


is_bnb_available = is_bnb_4bit_available = cache(partial(_available, "bitsandbytes"))
is_gptqmodel_available = cache(partial(_available, "gptqmodel"))
is_optimum_available = cache(partial(_available, "optimum"))
is_aqlm_available = cache(partial(_available, "aqlm"))
is_eetq_available = cache(partial(_available, "eetq"))
is_hqq_available = cache(partial(_available, "hqq"))
is_inc_available = cache(partial(_available, "neural_compressor"))
is_torchao_available = cache(partial(_available, "torchao"))
is_diffusers_available = cache(partial(_available, "diffusers"))
is_te_available = cache(partial(_available, "transformer_engine"))


def is_torch_tpu_available(check_device: bool = True) -> bool:
    return _available("torch_xla")


def is_xpu_available(check_device: bool = False) -> bool:
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def _at_least(package: str, major: int, minor: int = 0) -> bool:
    try:
        parts = version(package).split(".")
    except PackageNotFoundError:
        return False
    return (int(parts[0]), int(parts[1])) >= (major, minor)


def is_torchao_ge_v0_18_0() -> bool:
    """A call, where the tests of versions of transformers are values."""
    return _at_least("torchao", 0, 18)


def __getattr__(name: str) -> Any:
    if name == "PEFT_TYPE_TO_CONFIG_MAPPING":
        return {t: config_of(t) for t in PeftType}
    if name == "PEFT_TYPE_TO_PREFIX_MAPPING":
        return {PeftType(t): method_of(t).prefix for t in METHODS}
    if name in ("PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING"):
        mixed = "MIXED" in name
        return {PeftType(t): find(f"{stem}Model") for t, stem, _ in TUNERS.values()
                if t in METHODS and (not mixed or t in _MIXED)}  # fmt: skip
    if name == "MODEL_TYPE_TO_PEFT_MODEL_MAPPING":
        from fastadapt.peft_model import BY_TASK

        return {task.value: cls for task, cls in BY_TASK.items()}
    if name.startswith("is_") and "_ge_v" in name:
        package, _, wanted = name[3:].partition("_ge_v")
        numbers = [int(n) for n in wanted.split("_")] if "_" in wanted else None
        if numbers is None:
            numbers = [0, int(wanted)] if wanted.startswith("0") else [int(wanted)]
        return _at_least(package, *numbers[:2])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
