# SPDX-License-Identifier: Apache-2.0
"""fastadapt: parameter-efficient fine-tuning with PEFT's interface and files.

Importing it changes nothing in torch, transformers, peft or trl; names are loaded at first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from fastadapt.compat import names

__version__ = "0.1.0"

_NAMES = {
    "fastadapt.patch.inplace": "patch unpatch",
    "fastadapt.reference": "reference",
    "fastadapt.explain": "explain",
    "fastadapt.ops.dispatch": "use",
    "fastadapt.dialect_writers": "kohya_state_dict diffusers_state_dict",
    "fastadapt.kbit": "prepare_model_for_kbit_training",
    "fastadapt.config": "PeftConfig PeftType TaskType",
    "fastadapt.methods.lora": "LoraConfig LoraRuntimeConfig",
    "fastadapt.methods.velora": "VeloraConfig",
    "fastadapt.methods.monteclora": "MontecloraConfig",
    "fastadapt.methods.kasa": "KasaConfig",
    "fastadapt.methods.bdlora": "BdLoraConfig",
    "fastadapt.inits.eva": "EvaConfig",
    "fastadapt.eva": "initialize_lora_eva_weights get_eva_state_dict",
    "fastadapt.inits.corda": "CordaConfig preprocess_corda",
    "fastadapt.inits.lora_ga": "LoraGAConfig preprocess_loraga",
    "fastadapt.inits.loftq": "LoftQConfig replace_lora_weights_loftq",
    "fastadapt.methods.trainable_tokens": "TrainableTokensConfig",
    "fastadapt.methods.ia3": "IA3Config",
    "fastadapt.methods.ln_tuning": "LNTuningConfig",
    "fastadapt.methods.hira": "HiraConfig",
    "fastadapt.methods.miss": "MissConfig",
    "fastadapt.methods.adalora": "AdaLoraConfig",
    "fastadapt.methods.lokr": "LoKrConfig",
    "fastadapt.methods.loha": "LoHaConfig",
    "fastadapt.methods.vera": "VeraConfig",
    "fastadapt.methods.waveft": "WaveFTConfig",
    "fastadapt.methods.tinylora": "TinyLoraConfig",
    "fastadapt.methods.unilora": "UniLoraConfig",
    "fastadapt.methods.pvera": "PveraConfig",
    "fastadapt.methods.c3a": "C3AConfig",
    "fastadapt.methods.randlora": "RandLoraConfig",
    "fastadapt.methods.fourierft": "FourierFTConfig",
    "fastadapt.methods.vblora": "VBLoRAConfig",
    "fastadapt.methods.oft": "OFTConfig",
    "fastadapt.methods.hra": "HRAConfig",
    "fastadapt.methods.boft": "BOFTConfig",
    "fastadapt.methods.road": "RoadConfig",
    "fastadapt.methods.shira": "ShiraConfig",
    "fastadapt.methods.delora": "DeloraConfig",
    "fastadapt.methods.gralora": "GraloraConfig",
    "fastadapt.methods.beft": "BeftConfig",
    "fastadapt.methods.deft": "DeftConfig",
    "fastadapt.methods.glora": "GloraConfig",
    "fastadapt.methods.peanut": "PeanutConfig",
    "fastadapt.methods.lily": "LilyConfig",
    "fastadapt.unbuilt": (
        "PromptLearningConfig PromptTuningConfig MultitaskPromptTuningConfig PromptEncoderConfig "
        "PrefixTuningConfig CartridgeConfig CPTConfig AdaptionPromptConfig PolyConfig ShadowConfig "
        "XLoraConfig PromptTuningInit MultitaskPromptTuningInit "
        "PromptEncoderReparameterizationType ArrowConfig"
    ),
    "fastadapt.optimizers": (
        "create_loraplus_optimizer create_lorafa_optimizer create_riemannian_optimizer"
    ),
    "fastadapt.methods.psoft": "PsoftConfig",
    "fastadapt.methods.supertuning": "SupertuningConfig",
    "fastadapt.methods.osf": "OSFConfig",
    "fastadapt.methods.frod": "FrodConfig",
    "fastadapt.methods.adamss": "AdamssConfig",
    "fastadapt.peft_model": (
        "get_peft_model PeftModel PeftModelForCausalLM PeftModelForSeq2SeqLM "
        "PeftModelForSequenceClassification PeftModelForTokenClassification "
        "PeftModelForQuestionAnswering PeftModelForFeatureExtraction"
    ),
    "fastadapt.errors": (
        "FastAdaptError ConfigError TargetError UnsupportedError LifecycleError CheckpointError "
        "KernelError DataError OutputError MissingExtraError FastAdaptWarning"
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted({*_HOME, *names.public()})  # noqa: PLE0605


def own_names() -> dict[str, str]:
    """The names of fastadapt's own modules -> the module that has it."""
    return _HOME


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value
    if name in __all__:
        return names.find(name)
    raise AttributeError(f"module 'fastadapt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """``patch``, ``reference`` and ``explain`` name a module each, too: importing one must not put
    the module where the function is expected."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
names.install()
