# SPDX-License-Identifier: Apache-2.0
"""PEFT's layer and model classes, as questions: ``isinstance(layer, lora.Linear)`` asks the one
AdaptedLayer for its methods, its kind and its format. None of them has an instance of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fastadapt.errors import UnsupportedError
from fastadapt.layer import AdaptedLayer
from fastadapt.methods import METHODS, method_of
from fastadapt.modules_to_save import ModulesToSaveWrapper
from fastadapt.weights.weight import Weight

_KINDS = {"Embedding": "embedding", "MultiheadAttention": "attention", "ParamWrapper": "parameter"}
_FORMATS = {
    "8bitLt": "bnb8", "4bit": "bnb4", "GPTQ": "gptq", "Awq": "awq", "Aqlm": "aqlm", "Eetq": "eetq",
    "Hqq": "hqq", "Torchao": "torchao",
}  # fmt: skip


class _Question(type):
    """The class of the classes here. holds: what an instance must satisfy."""

    peft_type: str | None
    package: str

    def __instancecheck__(cls, instance: Any) -> bool:
        return bool(cls.holds(instance))  # type: ignore[attr-defined]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            f"{cls.__name__} is made by get_peft_model or inject_adapter_in_model, not by a call"
        )


class _LayerQuestion(_Question):
    def __subclasscheck__(cls, other: type) -> bool:
        return type.__subclasscheck__(cls, other) or (
            cls.__name__ == "BaseTunerLayer" and issubclass(other, AdaptedLayer)
        )


class BaseTunerLayer(metaclass=_LayerQuestion):
    """Any adapted layer."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    @staticmethod
    def holds(instance: Any) -> bool:
        return isinstance(instance, AdaptedLayer)


class AuxiliaryTrainingWrapper(metaclass=_Question):
    """Any module that is trained beside the adapters: whole, or some of its tokens."""

    @staticmethod
    def holds(instance: Any) -> bool:
        return isinstance(instance, ModulesToSaveWrapper) or TrainableTokensWrapper.holds(instance)


class TrainableTokensWrapper(metaclass=_Question):
    """An embedding some of whose rows are trained."""

    @staticmethod
    def holds(instance: Any) -> bool:
        return isinstance(instance, AdaptedLayer) and hasattr(instance, "token_adapter")


class QuantizationBackend(metaclass=_Question):
    """The ``quantization_backend`` of a layer on a quantised base."""

    form = ""

    @classmethod
    def holds(cls, instance: Any) -> bool:
        return isinstance(instance, Weight) and instance.quantised and cls.form in instance.name


class Bnb4bitBackend(QuantizationBackend):
    form = "bnb4"


class Bnb8bitBackend(QuantizationBackend):
    form = "bnb8"


class _ModelQuestion(_Question):
    """isinstance asks which method's adapters a model holds; a call injects an adapter."""

    def __instancecheck__(cls, instance: Any) -> bool:
        from fastadapt.tuner import Tuner

        if not isinstance(instance, Tuner):
            return False
        types = [_type(c) for c in instance.peft_config.values()]
        return cls.peft_type is None or types[:1] == [cls.peft_type]

    def __getattr__(cls, name: str) -> Any:
        if cls.peft_type in METHODS and name in ("prefix", "target_module_mapping"):
            method = method_of(cls.peft_type)
            return method.prefix if name == "prefix" else dict(method.Config.default_targets)
        if name == "tuner_layer_cls":
            return BaseTunerLayer
        if name == "uses_shared_state":
            # shared tensors belong to the layers, so that injection works without a wrapper
            return False
        if name == "get_model_config":
            return BaseTuner.get_model_config
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")

    def __call__(
        cls,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> Any:
        from fastadapt.peft_model import tuner

        if cls.peft_type is None or cls.peft_type not in METHODS:
            raise UnsupportedError(f"{cls.__name__}: not built yet in fastadapt")
        return tuner(model, peft_config, adapter_name)


class BaseTuner(metaclass=_ModelQuestion):
    """Any ``base_model`` of a PeftModel."""

    peft_type = None

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's config as a dict; that of a "custom" model where it has none."""
        config: Any = getattr(model, "config", {"model_type": "custom"})
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        found: dict[str, Any] = (
            dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config  # type: ignore[arg-type]
        )
        return found


def layer_class(name: str, peft_type: str, package: str) -> Any:
    """PEFT's class ``name`` for the layers of one method."""
    kind = next((k for end, k in _KINDS.items() if name.endswith(end)), None)
    dims = int(name[-2]) if name.endswith(("1d", "2d", "3d")) else None
    form = next((f for part, f in _FORMATS.items() if part in name), None)

    def holds(instance: Any) -> bool:
        if not isinstance(instance, AdaptedLayer):
            return False
        if peft_type not in {_type(a.config) for a in instance.adapters.values() if a.config}:
            return False
        if name.endswith("Layer"):
            return True
        found, stored = instance.frozen.kind.name, instance.frozen.weight.name
        if form is not None:
            return stored == form
        if dims is not None:
            return found == "conv" and len(instance.frozen.shape) == dims + 2
        if kind is not None:
            return bool(found == kind)
        return found in ("linear", "conv1d_gpt2") and stored not in ("bnb4", "bnb8")

    members = {
        "holds": staticmethod(holds), "peft_type": peft_type, "package": package,
        "__module__": f"fastadapt.tuners.{package}.layer", "adapter_layer_names": (),
    }  # fmt: skip
    return _LayerQuestion(name, (), members)


def model_class(name: str, peft_type: str, package: str) -> Any:
    """PEFT's class ``name`` for the ``base_model`` of one method."""
    where = f"fastadapt.tuners.{package}.model"
    return _ModelQuestion(name, (), {"peft_type": peft_type, "package": package,
                                     "__module__": where})  # fmt: skip


class _Absent(type):
    def __getattr__(cls, name: str) -> Any:
        if name.isupper() and cls.__name__.endswith(("Init", "Type")):
            return name
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")

    def __instancecheck__(cls, instance: Any) -> bool:
        return False

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(f"{cls.__name__}: not built yet in fastadapt")


class _LaterConfig:
    """A configuration whose method is not built yet: it holds its fields, since scripts make
    configurations early, and get_peft_model refuses it."""

    peft_type: str | None = None

    def __init__(self, *_: Any, **fields: Any) -> None:
        vars(self).update(fields)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def absent(name: str, peft_type: str | None = None) -> Any:
    """A name of PEFT without behaviour yet: a class or a function, raising when it is used. A
    configuration can be made, and is refused where a model would get it."""
    if name.endswith("Config"):
        return type(name, (_LaterConfig,), {"__module__": "fastadapt", "peft_type": peft_type})
    if name[0].isupper():
        return _Absent(name, (), {"__module__": "fastadapt"})

    def unsupported(*_: Any, **__: Any) -> Any:
        raise UnsupportedError(f"{name}: not built yet in fastadapt")

    unsupported.__name__ = unsupported.__qualname__ = name
    return unsupported


def target_mapping(name: str) -> dict[str, Any]:
    """``TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING``: model type -> default targets;
    nothing for a method that is not built yet."""
    stem = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MODULES_MAPPING")
    method, _, what = stem.rpartition("_")
    method = {"LNTUNING": "LN_TUNING"}.get(method, method)
    if what != "TARGET" or method not in METHODS:
        return {}
    return dict(method_of(method).Config.default_targets)


def _type(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
