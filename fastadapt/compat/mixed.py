# SPDX-License-Identifier: Apache-2.0
"""``PeftMixedModel``: adapters of several methods on one model.

Every PeftModel of fastadapt can hold them; this class keeps the restrictions that PEFT's has.
"""

from __future__ import annotations

from typing import Any

from fastadapt.config import PeftType
from fastadapt.errors import LifecycleError, UnsupportedError
from fastadapt.peft_model import PeftModel
from fastadapt.tuner import Tuner

COMPATIBLE_TUNER_TYPES = tuple(
    PeftType(n) for n in ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA")
)
MixedModel = Tuner


class PeftMixedModel(PeftModel):
    """Adapters of several methods, several active at once; saving is not supported."""

    def _check_new(self, name: str, config: Any) -> None:
        if PeftType(config.peft_type) not in COMPATIBLE_TUNER_TYPES:
            raise LifecycleError(
                f"The provided `peft_type` '{config.peft_type.value}' is not compatible with the "
                f"`PeftMixedModel`. Compatible types are: {COMPATIBLE_TUNER_TYPES}"
            )
        if name in self._configs:
            raise LifecycleError(f"Adapter with name '{name}' already exists.")
        super()._check_new(name, config)

    def _check_beside(self, method: Any, config: Any, others: dict[str, Any]) -> None:
        """PEFT's rules for adapters of one method are not those of its mixed model."""

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        self._check_there(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: Any) -> None:
        """Remove one or several adapters."""
        self._check_there(adapter_name)
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_unmerged(names)
        for name in names:
            super().delete_adapter(name)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise UnsupportedError("Saving is not supported for PeftMixedModel (yet).")

    def create_or_update_model_card(self, output_dir: Any) -> None:
        raise UnsupportedError("Model card creation is not supported for PeftMixedModel (yet).")

    def get_layer_status(self) -> Any:
        raise TypeError("get_layer_status is not supported for PeftMixedModel.")

    def get_model_status(self) -> Any:
        raise TypeError("get_model_status is not supported for PeftMixedModel.")

    def _check_there(self, names: Any) -> None:
        wanted = {names} if isinstance(names, str) else set(names)
        absent = sorted(wanted - set(self._configs))
        if absent:
            raise LifecycleError(
                f"Adapter(s) {absent} not found, available adapters: {sorted(self._configs)}"
            )
